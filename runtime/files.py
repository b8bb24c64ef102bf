"""Files that are never half-written: atomic JSON, checksums, paths that stay inside a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError, UsageError

_COUNTER = itertools.count()  # several threads may write at once
_FULL = (errno.ENOSPC, errno.EDQUOT)
CACHE_VARIABLE = "GTR_DEPLOY_CACHE"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that Git LFS leaves in a large file's place until it is told to fetch it."""


def cache_dir() -> Path:
    """Where downloads, digests and compiled kernels are kept: $GTR_DEPLOY_CACHE, or ~/.cache/gtr-deploy; a private
    folder among the temporary ones for a user without a home.

    Raises:
        UsageError: that folder is somebody else's.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "gtr-deploy"
    except RuntimeError:  # containers run under numbers that nobody has given a name or a home
        folder = Path(tempfile.gettempdir()) / f"gtr-deploy-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise UsageError(f"there is no home folder, and {folder} is not yours; set {CACHE_VARIABLE}") from None
        return folder


@contextmanager
def atomic_path(path: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary path beside ``path`` with the same suffix; renamed over it if the block ends without an error.

    Args:
        size: bytes of the whole file where that is known, for the line that says that they do not fit.

    Raises:
        OSError: the file cannot be written; on a full disk it names ``path``, the bytes needed and those free.
    """
    temporary = path.with_name(f"{_temporary(str(os.getpid()))}-{next(_COUNTER)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield temporary
        os.chmod(temporary, 0o644)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _FULL or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, _full(temporary, size, error.strerror or "disk full"), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _full(temporary: Path, size: int | None, reason: str) -> str:
    needed = f"{size:,}" if size is not None else ""
    with contextlib.suppress(OSError):
        needed = needed or f"more than {temporary.stat().st_size:,}"
        return f"{reason}: the file needs {needed} bytes, {shutil.disk_usage(temporary.parent).free:,} are free"
    return reason


def sweep(folder: Path) -> None:
    """Removes what processes of this machine that were killed while they held an :func:`atomic_path` have left."""
    for path in folder.glob(f"{_temporary('*')}-*"):
        pid = path.name.removeprefix(_temporary("")).partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            path.unlink(missing_ok=True)


def _temporary(pid: str) -> str:
    """The beginning of a temporary file's name. Processes of other machines may share the folder."""
    return f".gtr-{re.sub('[^A-Za-z0-9]', '', platform.node())}-{pid}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OverflowError:
        return False
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted-as-given keys, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        BundleError: missing, unreadable, or not JSON (duplicate keys count as not JSON).
    """
    return read_json_and_bytes(path)[0]


def read_json_and_bytes(path: Path) -> tuple[Any, bytes]:
    """The same, and the very bytes that it was read from, for a stricter reader."""
    try:
        content = path.read_bytes()
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique("key")), content
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None


def unique(what: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """An ``object_pairs_hook`` of ``json.loads``: ValueError where a key, called ``what``, stands twice."""

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError(f"a {what} stands twice")
        return result

    return made


def link_or_copy(source: Path, target: Path) -> None:
    """Puts a file at ``target``, in place of what is there: a hard link where that is allowed, else a copy.

    ONNX refuses weights beside a graph (``.data``) that have a second link, lest a bundle shows it another's file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if source.suffix != ".data":
        with contextlib.suppress(OSError):
            os.link(source.resolve(), target)  # not a link itself, which may lead elsewhere from there
            return
    shutil.copy2(source, target)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named(folder: Path, relative: str) -> Path:
    """``folder / relative``, for a plain relative POSIX path; links may lead out of ``folder`` all the same.

    Raises:
        BundleError: the path is absolute, or climbs out.
    """
    parts = PurePosixPath(relative)
    if not relative or parts.is_absolute() or ".." in parts.parts or "\\" in relative or "\0" in relative:
        raise BundleError(f"{relative!r} is not a path inside the bundle {folder}")
    return folder / relative


def leads_out(folder: Path, path: Path) -> bool:
    """Whether ``path`` is not below ``folder`` once links are followed."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def inside(folder: Path, relative: str) -> Path:
    """The same, of a path that stays inside ``folder``, links followed.

    Raises:
        BundleError: the path is absolute, climbs out, or leads out through a link.
    """
    path = named(folder, relative)
    if leads_out(folder, path):
        raise BundleError(f"{relative!r} leads outside the bundle {folder}")
    return path
