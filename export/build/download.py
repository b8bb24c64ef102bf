"""Finds published weights on this machine, or downloads them: resumable, checked by size, one process at a time.

Knows nothing about what is in a file (checkpoints.py) or which file belongs to which model (zoo.py). The publisher
gives no digests, so a wrong size and a web page in place of a file are all that can be recognised here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ...runtime.errors import GtrError
from ...runtime.files import CACHE_VARIABLE, cache_dir
from ..zoo import MEBIBYTE, WeightSource

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""

SIZE_TOLERANCE = MEBIBYTE
"""Published sizes are rounded to whole MiB."""

_BLOCK = MEBIBYTE
_ADVICE = "give files with --checkpoint and --vae, or try the pipeline with --random-weights"
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)


class _WrongFileError(Exception):
    """What the server sends can never become the file."""


class _DownloadCutError(Exception):
    """The connection failed before the end."""

    def __init__(self, reason: str, worth_a_retry: bool = True) -> None:
        super().__init__(reason)
        self.worth_a_retry = worth_a_retry


def find_or_download(source: WeightSource, cached_name: str, progress: Progress, timeout: float = 60.0) -> Path:
    """A published file: from the cache folder, else from where the original project puts it, else downloaded.

    Args:
        source: address, size, and the original project's default path, taken relative to the current folder.
        cached_name: path inside :func:`~..runtime.files.cache_dir`, for example ``mar-h/checkpoint-last.pth``.
        progress: called while downloading.
        timeout: seconds without a byte before a connection counts as cut.

    Raises:
        GtrError: a file is there and has the wrong size, or the download failed.
    """
    cached = cache_dir() / cached_name
    for candidate in (cached, Path(source.default_path)):
        if candidate.is_file():
            size = candidate.stat().st_size
            if not _right_size(size, source.mebibytes):
                raise GtrError(
                    f"{candidate} has {_mib(size)} MiB, the published file has {source.mebibytes} MiB; "
                    "delete it and run again, or give another with --checkpoint or --vae"
                )
            return candidate
    return download(source.url, cached, source.mebibytes, progress, timeout)


def download(
    url: str,
    target: Path,
    expected_mebibytes: int,
    progress: Progress,
    timeout: float = 60.0,
    *,
    retries: int = 3,
    backoff: float = 2.0,
) -> Path:
    """Downloads ``url`` to ``target``; goes on from ``target``'s ``.part`` file where an earlier run left one.

    Args:
        url: http or https address.
        target: appears only when complete. A file of the right size that is already there is kept.
        expected_mebibytes: published size; more than 1 MiB off is refused.
        progress: called with (bytes done, bytes in total), also once at the start.
        timeout: seconds without a byte before the connection counts as cut.
        retries: further tries after a cut connection or a busy server, each going on where the last one stopped;
            none where the first try finds no server at all.
        backoff: seconds before the first retry; twice as long before each further one.

    Returns:
        ``target``.

    Raises:
        GtrError: no connection, a refusal, the wrong file, no disk space, or another process at the same download.
    """
    name = f"{target.parent.name}/{target.name}"
    part = target.with_suffix(target.suffix + ".part")
    with _file_errors(target), _locked(target):
        if target.is_file() and _right_size(target.stat().st_size, expected_mebibytes):
            return target
        _check_space(part, expected_mebibytes)
        for attempt in range(retries + 1):
            if attempt:
                time.sleep(backoff * 2 ** (attempt - 1))
            try:
                # Without any network there is nothing to wait for; one that was there a moment ago may come back.
                _receive(url, part, expected_mebibytes, progress, timeout, reconnect=attempt > 0)
                break
            except _WrongFileError as error:
                raise GtrError(f"cannot download {name} ({error}); {_ADVICE}") from None
            except _DownloadCutError as error:
                if attempt == retries or not error.worth_a_retry:
                    raise GtrError(_failure(name, part, expected_mebibytes, str(error))) from None
        os.replace(part, target)
    return target


def _failure(name: str, part: Path, expected_mebibytes: int, reason: str) -> str:
    arrived = _size(part)
    if not arrived:
        return f"cannot download {name} ({reason}); {_ADVICE}"
    return (
        f"the download of {name} stopped at {_mib(arrived)} of {expected_mebibytes} MiB ({reason}); "
        f"run again to go on from there, or {_ADVICE}"
    )


def _receive(
    url: str, part: Path, expected_mebibytes: int, progress: Progress, timeout: float, reconnect: bool
) -> None:
    """One connection: appends to ``part`` until the file is whole.

    Raises:
        _DownloadCutError: it ended early; ``part`` keeps what arrived.
        _WrongFileError: this can never become the file.
    """
    done = _size(part)
    if done > expected_mebibytes * MEBIBYTE + SIZE_TOLERANCE:  # another file's leftovers
        part.unlink()
        done = 0
    headers = {"User-Agent": "gtr-deploy", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 416 or not done:
                reason = f"HTTP {error.code} {error.reason}"
                raise _DownloadCutError(reason, worth_a_retry=error.code in _RETRIED_STATUS) from None
            # Nothing after what is already here: either all of it is, or it belongs to another file.
            if _total_of_range(error.headers.get("Content-Range")) != done:
                part.unlink()
                raise _DownloadCutError("the part that was here did not fit") from None
        _check_size(part, done, expected_mebibytes)
        progress(done, done)
        return
    except urllib.error.URLError as error:  # not even a connection
        raise _DownloadCutError(_reason(error), worth_a_retry=reconnect) from None
    except (OSError, http.client.HTTPException) as error:
        raise _DownloadCutError(_reason(error)) from None
    with response:
        if response.headers.get_content_type() == "text/html":
            raise _WrongFileError("the server answered with a web page instead of the file")
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        if response.status == 206:
            content_range = response.headers.get("Content-Range") or ""
            if not content_range.startswith(f"bytes {done}-"):
                part.unlink(missing_ok=True)
                raise _DownloadCutError(f"the server sent another range than asked for, {content_range!r}")
            total = _total_of_range(content_range) or (None if total is None else done + total)
        else:
            done = 0  # the server ignores ranges: from the start
        if total is not None:
            _check_size(part, total, expected_mebibytes)
        progress(done, total or expected_mebibytes * MEBIBYTE)
        with part.open("ab" if done else "wb") as file:
            done = _copy(response, file, done, total, expected_mebibytes, progress)
            file.flush()
            os.fsync(file.fileno())
    if done < (total if total is not None else expected_mebibytes * MEBIBYTE - SIZE_TOLERANCE):
        raise _DownloadCutError("the connection closed early")
    _check_size(part, done, expected_mebibytes)


def _copy(
    response: http.client.HTTPResponse,
    file: BinaryIO,
    done: int,
    total: int | None,
    expected_mebibytes: int,
    progress: Progress,
) -> int:
    """Copies block by block to the end of the answer; the bytes then in the file."""
    limit = total if total is not None else expected_mebibytes * MEBIBYTE + SIZE_TOLERANCE
    while done <= limit:
        try:
            # read1 hands over what has arrived, so that a cut loses nothing that came before it.
            block = response.read1(_BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _DownloadCutError(_reason(error)) from None
        if not block:
            break
        file.write(block)
        done += len(block)
        progress(done, total or max(done, expected_mebibytes * MEBIBYTE))
    return done


def _check_size(part: Path, size: int, expected_mebibytes: int) -> None:
    if not _right_size(size, expected_mebibytes):
        part.unlink(missing_ok=True)
        raise _WrongFileError(f"the server's file has {_mib(size)} MiB, the published one {expected_mebibytes} MiB")


def _check_space(part: Path, expected_mebibytes: int) -> None:
    needed = expected_mebibytes * MEBIBYTE - _size(part)
    free = shutil.disk_usage(part.parent).free
    if free < needed:
        raise GtrError(
            f"{part.parent} has {_mib(free)} MiB free, the download needs {_mib(needed)} MiB; "
            f"make room, or set {CACHE_VARIABLE} to a folder on another disk"
        )


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Holds ``target``'s .lock file, in a folder that exists. The file stays: removing it would race."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(target.suffix + ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GtrError(f"another process is downloading {target}; wait until it ends, then run again") from None
        yield


@contextlib.contextmanager
def _file_errors(target: Path) -> Iterator[None]:
    """Turns a failure of the disk (network failures never get this far) into one line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise GtrError(f"no space left for {target}; make room and run again to go on") from None
        reason = error.strerror or str(error)
        raise GtrError(f"cannot write {target} ({reason}); set {CACHE_VARIABLE} to a folder you may write to") from None


def _total_of_range(content_range: str | None) -> int | None:
    """TOTAL of ``bytes FIRST-LAST/TOTAL`` or ``bytes */TOTAL``; None where the server does not say."""
    found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", (content_range or "").strip())
    return int(found.group(1)) if found else None


def _reason(error: Exception) -> str:
    """What failed, in a few words: ``Connection refused``, ``timed out``."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
    return text.partition("\n")[0]


def _right_size(size: int, expected_mebibytes: int) -> bool:
    return abs(size - expected_mebibytes * MEBIBYTE) <= SIZE_TOLERANCE


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _mib(size: int) -> str:
    return f"{size / MEBIBYTE:.1f}"
