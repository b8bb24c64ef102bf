"""One checkpoint in, its top-level mapping out, whoever wrote the file: no code runs, and time and memory stay within a
few seconds and what the file itself takes. Does not know what a mapping must hold (state_dicts.py, checkpoints.py)."""

from __future__ import annotations

import argparse
import json
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...runtime.errors import printable
from ...runtime.files import unique
from .archives import check_archive
from .files import LONGEST_HEADER, MOST_TENSORS, is_index, read_index, read_start, refusal, weights_file
from .pickles import LONGEST_PICKLE, CodeError, RefusedError, check_legacy, check_pickle

_CONVERT = "refused. Convert it to .safetensors on a machine you trust"


def read_checkpoint(path: Path) -> Mapping[Any, Any]:
    """The file's top-level mapping; its content decides how it is read, not its suffix.

    Values are tensors, plain containers, numbers, pure paths and ``argparse.Namespace``; keys are text, numbers or
    None. Tensors stay mapped to the file where the format allows.

    Args:
        path: a file, an index of shards, or a folder with one of them (files.py).

    Raises:
        GtrError: no such file, not a checkpoint, or one that cannot be read safely.
    """
    path = weights_file(path)
    if is_index(path):
        return _read_shards(path)
    start, size = read_start(path), path.stat().st_size
    if start[8:9] == b"{":
        return _read_safetensors(path, int.from_bytes(start[:8], "little"), size)
    is_zip = start.startswith(b"PK\x03\x04")
    if is_zip and not zipfile.is_zipfile(path):
        raise refusal(path, f"is cut short: {size} bytes and no end of the archive; download it again")
    if not is_zip and not start.startswith(b"\x80"):
        raise refusal(path, "is not a checkpoint: neither .safetensors nor a file that torch.save wrote")
    content = _read_pickle(path, is_zip, size)
    if not isinstance(content, Mapping):
        raise refusal(path, f"holds a {type(content).__name__}, not a state dict; give a checkpoint file")
    return content


def _read_safetensors(path: Path, header_bytes: int, size: int) -> Mapping[str, Any]:
    """The library checks types, offsets and sizes; not how long the header is, how many tensors
    it names, or that no name stands twice."""
    try:
        if header_bytes > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"a header of {header_bytes} bytes")
        with path.open("rb") as file:
            file.seek(8)
            header = file.read(header_bytes)
        if len(json.loads(header, object_pairs_hook=unique("name"))) > MOST_TENSORS:
            raise ValueError(f"more than {MOST_TENSORS} tensors")
        return load_file(path)
    except (SafetensorError, ValueError, OSError, RecursionError, MemoryError) as error:
        raise refusal(path, f"is a damaged .safetensors file ({_line(error)}); download it again") from None


def _read_shards(index: Path) -> Mapping[str, Any]:
    """The tensors of all shards, each in the one shard that the index says."""
    content: dict[str, Any] = {}
    for shard, listed in read_index(index).items():
        start = read_start(shard)
        found = _read_safetensors(shard, int.from_bytes(start[:8], "little"), shard.stat().st_size)
        if twice := sorted(found.keys() & content.keys()):
            raise refusal(
                shard, f"holds {printable(twice[0], 60)}, which another shard holds, too; download both again"
            )
        if missing := sorted(listed - found.keys()):
            raise refusal(shard, f"lacks {_counted(missing)}, which its index lists; download it again")
        if unlisted := sorted(found.keys() - listed):
            raise refusal(shard, f"holds {_counted(unlisted)}, which its index does not list; download both again")
        content |= found
    return content


def _counted(names: list[str]) -> str:
    return printable(names[0], 60) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _read_pickle(path: Path, is_zip: bool, size: int) -> Any:
    """``torch.load`` without code, once the file was found to be such as ``torch.save`` writes."""
    try:
        _check_zip(path) if is_zip else _check_old(path, size)
        # The warnings would only repeat, in many lines, what the error below says in one.
        with torch.serialization.safe_globals([*_STAND_INS]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CodeError as error:
        raise refusal(path, f"holds Python code ({error}), not only weights; {_CONVERT}") from None
    except RefusedError as error:
        raise refusal(path, f"holds a pickle that cannot be read safely ({error}); {_CONVERT}") from None
    except zipfile.BadZipFile as error:
        raise refusal(path, f"is not an archive as torch.save writes it ({error}); save it again so") from None
    except Exception as error:  # a damaged or hostile file can make the reader fail in any way at all
        raise refusal(path, f"is damaged or not a checkpoint ({_line(error)}); download it again") from None


class _NumberType:
    """What stands for numpy.dtype while a file is read; the pickle was found to say nothing else (pickles.py)."""

    def __init__(self, code: str, *_: bool) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _number(kind: _NumberType, data: bytes) -> Any:
    return np.frombuffer(data, kind.order + kind.code)[0].item()


_STAND_INS: list[Any] = [
    argparse.Namespace,  # the original training script stores its arguments in one
    (_NumberType, "numpy.dtype"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]
"""What torch's reader may call besides its own: of other libraries' names only values of our own making, which reach no
file and run nothing of theirs."""


def _check_zip(path: Path) -> None:
    """Every storage that the pickle names is a member of just its size, where its values can be mapped."""
    members = check_archive(path)
    member = members.get("data.pkl")
    if member is None or "constants.pkl" in members:
        raise ValueError("no data.pkl" if member is None else "a TorchScript archive")
    with path.open("rb") as file:
        file.seek(member.offset)
        storages = check_pickle(file.read(member.bytes))
    for storage in storages.values():
        member = members.get(f"data/{storage.key}")
        if member is None or member.bytes != storage.bytes:
            held = "none" if member is None else f"{member.bytes} bytes"
            raise RefusedError(f"storage {printable(storage.key)} of {storage.bytes} bytes, the archive holds {held}")
        if member.offset % storage.item_bytes:
            raise zipfile.BadZipFile(f"storage {printable(storage.key)} is not aligned")


def _check_old(path: Path, size: int) -> None:
    """The storages follow the pickles, each after its number of values."""
    with path.open("rb") as file:
        storages, position = check_legacy(file.read(LONGEST_PICKLE))
        for storage in storages:
            file.seek(position)
            (values,) = struct.unpack("<q", file.read(8))
            position += 8 + storage.bytes
            if values != storage.values or position > size:
                raise ValueError(f"storage {printable(storage.key)} of {storage.bytes} bytes is not all there")


def _line(error: Exception) -> str:
    """What a library says, its first line."""
    text = printable(str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {text}".removesuffix(": ")
