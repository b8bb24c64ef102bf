"""SHA-256 of large files, remembered: a checkpoint has several GB. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ...runtime.errors import GtrError
from ...runtime.files import cache_dir, write_json
from .files import is_index, read_index


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex, remembered by absolute path, size and modification time.

    Raises:
        GtrError: the file cannot be read.
    """
    store = cache_dir() / "sha256.json"
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
            known = _remembered(store).get(str(path.absolute()))
            if isinstance(known, dict) and all(known.get(name) == value for name, value in stamp.items()):
                digest = known.get("sha256")
                if isinstance(digest, str):
                    return digest
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GtrError(f"cannot read {path} ({error.strerror}); give a file that you may read") from None
    # Read again: another process may have added to it while this one was busy. A cache folder that cannot be written
    # costs time, nothing else.
    with contextlib.suppress(OSError):
        write_json(store, {**_remembered(store), str(path.absolute()): {**stamp, "sha256": digest}})
    return digest


def weights_sha256(path: Path) -> str:
    """SHA-256 of a checkpoint: of its one file; of an index of shards that of what ``sha256sum`` prints of the index
    and then of its shards by name, each a line of digest, two spaces and name.

    Raises:
        GtrError: a file cannot be read, or a shard is not there.
    """
    if not is_index(path):
        return file_sha256(path)
    lines = [f"{file_sha256(file)}  {file.name}\n" for file in (path, *read_index(path))]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def known_file(digest: str) -> Path | None:
    """A checkpoint with this SHA-256 that somebody on this machine has built from, as far as the memory goes."""
    for name, known in _remembered(cache_dir() / "sha256.json").items():
        path = Path(name)
        if is_index(path):
            with contextlib.suppress(GtrError):
                if weights_sha256(path) == digest:
                    return path
        if isinstance(known, dict) and known.get("sha256") == digest and path.is_file():
            status = path.stat()
            if (status.st_size, status.st_mtime_ns) == (known.get("size"), known.get("mtime_ns")):
                return path
    return None


def _remembered(store: Path) -> dict[str, Any]:
    """The stored digests; empty where the file is missing or damaged."""
    try:
        value = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
