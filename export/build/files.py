"""Which files a checkpoint is made of, and what is plainly no weights. Imports no torch; reads no tensor (reading.py).

One file; or an index of Hugging Face's kind (``model.safetensors.index.json``) and the shards beside it; or a folder
with either. An index is somebody else's file: it names files of its own folder, nothing else. Of what else lies in such
a folder only config.json is read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TypeVar

from ...runtime.errors import GtrError, printable
from ...runtime.files import LFS_POINTER, unique

LONGEST_HEADER, MOST_TENSORS = 4_000_000, 20_000  # of a .safetensors file or an index; mar-h's has 0.1 MB and 700
_LONGEST_LINE, _LONGEST_PATH = 300, 140
_MOST_SHARDS = 1000
_WEIGHTS, _INDEX = ".safetensors", ".safetensors.index.json"
DIFFUSERS = "diffusion_pytorch_model"
"""How diffusers calls weights; variants in other precisions lie beside them."""
_PAGES = (b"<!doctype html", b"<html", b"<?xml")

Read = TypeVar("Read")


def refusal(path: Path, text: str) -> GtrError:
    """The error that says in one line what is wrong with a file; where that is too long its middle goes."""
    shown = printable(str(path), _LONGEST_PATH)
    return GtrError(f"{shown} {printable(text, _LONGEST_LINE - len(shown) - 1)}")


def weights_file(path: Path) -> Path:
    """The file that a checkpoint is read from: ``path`` itself, or in a folder what diffusers calls so, its one index,
    or its one .safetensors.

    Raises:
        GtrError: a folder with no such file or several, or one that links out of it.
    """
    try:
        if not path.is_dir():
            return path
        names = sorted(os.listdir(path))
    except (OSError, ValueError):
        return path  # whoever opens it says what is wrong
    known = [DIFFUSERS + suffix for suffix in (_INDEX, _WEIGHTS)]
    found = [name for name in known if name in names][:1]
    found = found or [name for name in names if name.endswith(_INDEX)]
    found = found or [name for name in names if name.endswith(_WEIGHTS)]
    found = found or [name for name in names if name == f"{DIFFUSERS}.bin"]
    if not found:
        raise refusal(path, "is a folder without .safetensors weights; give the checkpoint file itself")
    if len(found) > 1:
        raise refusal(path, f"is a folder with {len(found)} sets of weights: {', '.join(found[:3])}; give one of them")
    return _beside(path / found[0], found[0])


def is_index(path: Path) -> bool:
    """Whether a file is an index of shards, by its name."""
    return path.name.endswith(_INDEX)


def read_start(path: Path) -> bytes:
    """The first bytes of a checkpoint file that may be one.

    Raises:
        GtrError: missing, unreadable, not a plain file, empty, a Git LFS pointer or a web page.
    """
    start, size = _opened(path, lambda file: (file.read(512), os.fstat(file.fileno()).st_size))
    if size == 0:
        raise refusal(path, "is empty (0 bytes); download it again")
    if start.startswith(LFS_POINTER):
        raise refusal(
            path, "is a Git LFS pointer, not the weights; get them with git lfs pull, or download the file itself"
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        raise refusal(path, "is a web page (HTML), not weights; download the file itself")
    return start


def read_index(path: Path) -> dict[Path, set[str]]:
    """The shards of an index, sorted by name, and which tensors are in each.

    Raises:
        GtrError: no index, one that is too large, or shards that are missing or not beside it.
    """
    read_start(path)
    try:
        document = _document(path)
        listed = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("no weight_map from tensors to files")
        if len(listed) > MOST_TENSORS:
            raise ValueError(f"more than {MOST_TENSORS} tensors")
        names = sorted(set(listed.values()))
        if len(names) > _MOST_SHARDS:
            raise ValueError(f"more than {_MOST_SHARDS} shards")
    except (ValueError, RecursionError) as error:
        text = printable(str(error).partition("\n")[0], 100)
        raise refusal(path, f"is not an index of shards ({text}); download it again") from None
    shards: dict[str, set[str]] = {name: set() for name in names}
    for tensor, name in listed.items():
        shards[name].add(tensor)
    return {_beside(path, name): tensors for name, tensors in shards.items()}


def read_config(weights: Path) -> tuple[Path, dict[str, Any]] | None:
    """The config.json beside a file of weights, and what it holds; None where there is none.

    Raises:
        GtrError: it cannot be read, or is not a JSON object; or it is a link out of the folder.
    """
    if not weights.with_name("config.json").exists():
        return None
    path = _beside(weights, "config.json")
    try:
        document = _document(path)
        if not isinstance(document, dict):
            raise ValueError(f"a {type(document).__name__}")
    except (ValueError, RecursionError) as error:
        text = printable(str(error).partition("\n")[0], 100)
        raise refusal(path, f"is not a JSON object ({text}); download it again") from None
    return path, document


def _document(path: Path) -> Any:
    """What a JSON file holds; ValueError or RecursionError where it is none."""
    content = _opened(path, lambda file: file.read(LONGEST_HEADER + 1))
    if len(content) > LONGEST_HEADER:
        raise ValueError(f"more than {LONGEST_HEADER} bytes")
    return json.loads(content, object_pairs_hook=unique("name"))


def _beside(path: Path, name: str) -> Path:
    """The file of this name in the folder of ``path``; links may lead to that folder, or to the blobs of the Hugging
    Face cache that it is a snapshot of."""
    shown = printable(name, 60)
    if name in ("", ".", "..") or name != PurePath(name).name or "\\" in name or "\0" in name:
        raise refusal(path, f"names {shown}, which is not beside it; shards lie in the folder of their index")
    folder, file = Path(os.path.abspath(path.parent)), path.with_name(name)
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    homes = {os.path.realpath(home) for home in (folder, *blobs)}
    if os.path.dirname(os.path.realpath(file)) not in homes:
        raise refusal(path, f"{shown} is a link out of the folder; copy the file there")
    if not file.is_file():
        raise refusal(path, f"names {shown}, which is missing; download it again")
    return file


def _opened(path: Path, read: Callable[[BinaryIO], Read]) -> Read:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise refusal(path, "is a folder, not a checkpoint; give the file in it")
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise refusal(path, "is not a plain file; give a checkpoint file")
        with path.open("rb") as file:
            return read(file)
    except FileNotFoundError:
        raise refusal(path, "does not exist; give a checkpoint file") from None
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror}); give a checkpoint file that you may read") from None
    except ValueError:
        raise refusal(path, "is not a path; give a checkpoint file") from None
