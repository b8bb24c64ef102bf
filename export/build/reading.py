"""One checkpoint file in, its top-level mapping out, whoever wrote the file: no code runs, and time and memory stay
within a few seconds and what the file itself takes. Does not know what a mapping must hold (checkpoints.py)."""

from __future__ import annotations

import argparse
import json
import stat
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...runtime.errors import GtrError, printable
from .archives import check_archive
from .pickles import LONGEST_PICKLE, CodeError, RefusedError, check_legacy, check_pickle

_LONGEST_HEADER, _MOST_TENSORS = 4_000_000, 20_000  # of a .safetensors file; mar-h's has 0.1 MB and 700
_LONGEST_LINE, _LONGEST_PATH = 300, 140
_CONVERT = "refused. Convert it to .safetensors on a machine you trust"


def read_checkpoint(path: Path) -> tuple[Mapping[Any, Any], str]:
    """The file's top-level mapping, and ``safetensors`` or ``state dict``; its content decides, not its suffix.

    Values are tensors, plain containers and ``argparse.Namespace``; keys are text, numbers or None. Tensors stay mapped
    to the file where the format allows.

    Raises:
        GtrError: no such file, not a checkpoint, or one that cannot be read safely.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise refusal(path, "is a folder, not a checkpoint; give the file in it")
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise refusal(path, "is not a plain file; give a checkpoint file")
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise refusal(path, "does not exist; give a checkpoint file") from None
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror}); give a checkpoint file that you may read") from None
    except ValueError:
        raise refusal(path, "is not a path; give a checkpoint file") from None
    size = status.st_size
    if size == 0:
        raise refusal(path, "is empty (0 bytes); download it again")
    if start[8:] == b"{":
        return _read_safetensors(path, int.from_bytes(start[:8], "little"), size), "safetensors"
    is_zip = start.startswith(b"PK\x03\x04")
    if is_zip and not zipfile.is_zipfile(path):
        raise refusal(path, f"is cut short: {size} bytes and no end of the archive; download it again")
    if not is_zip and not start.startswith(b"\x80"):
        raise refusal(path, "is not a checkpoint: neither .safetensors nor a file that torch.save wrote")
    content = _read_pickle(path, is_zip, size)
    if not isinstance(content, Mapping):
        raise refusal(path, f"holds a {type(content).__name__}, not a state dict; give a checkpoint file")
    return content, "state dict"


def refusal(path: Path, text: str) -> GtrError:
    """The error that says in one line what is wrong with a file; where that is too long its middle goes."""
    shown = printable(str(path), _LONGEST_PATH)
    return GtrError(f"{shown} {printable(text, _LONGEST_LINE - len(shown) - 1)}")


def _read_safetensors(path: Path, header_bytes: int, size: int) -> Mapping[str, Any]:
    """The library checks types, offsets and sizes; not how long the header is, how many tensors
    it names, or that no name stands twice."""
    try:
        if header_bytes > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"a header of {header_bytes} bytes")
        with path.open("rb") as file:
            file.seek(8)
            header = file.read(header_bytes)
        if len(json.loads(header, object_pairs_hook=_unique)) > _MOST_TENSORS:
            raise ValueError(f"more than {_MOST_TENSORS} tensors")
        return load_file(path)
    except (SafetensorError, ValueError, OSError, RecursionError, MemoryError) as error:
        raise refusal(path, f"is a damaged .safetensors file ({_line(error)}); download it again") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _read_pickle(path: Path, is_zip: bool, size: int) -> Any:
    """``torch.load`` without code, once the file was found to be such as ``torch.save`` writes."""
    try:
        _check_zip(path) if is_zip else _check_old(path, size)
        # The Namespace is what the original training script stores its arguments in. The warnings would only repeat,
        # in many lines, what the error below says in one.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
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
