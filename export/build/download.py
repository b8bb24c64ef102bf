"""Finds published weights on this machine, or has curl download them: resumable, checked by size, one at a time.

Knows nothing about what is in a file (checkpoints.py) or which file belongs to which model (zoo.py). The publisher
gives no digests, so a wrong size and a web page in place of a file are all that can be recognised here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from ...runtime.commands.console import Progressed, Reporter
from ...runtime.errors import GtrError
from ...runtime.files import CACHE_VARIABLE, cache_dir
from ..zoo import MEBIBYTE, WeightSource

SIZE_TOLERANCE = MEBIBYTE
"""Published sizes are rounded to whole MiB."""

STALL_SECONDS = 60
"""Without a byte for so long a connection counts as cut."""

PAUSES = (2, 4, 8)
"""Seconds before each further try. Not curl's --retry, which first drops what the try before has brought."""

_ADVICE = "give files with --checkpoint and --vae, or try the pipeline with --random-weights"
_ELSEWHERE = f"make room, or set {CACHE_VARIABLE} to a folder on another disk that you may write to"
_NO_HOST, _NOT_WRITTEN, _NO_RANGES, _TOO_LARGE = (6, 7), 23, 33, 63  # curl's exit codes
_CUT = (18, 28, 52, 55, 56, 92)
_BUSY = ("408", "425", "429", "500", "502", "503", "504")


def find_or_download(source: WeightSource, cached_name: str, reporter: Reporter) -> Path:
    """A published file: from the cache folder, else from where the original project puts it, else downloaded.

    Args:
        source: address, size, and the original project's default path, taken relative to the current folder.
        cached_name: path inside :func:`~..runtime.files.cache_dir`, for example ``mar-h/checkpoint-last.pth``.

    Raises:
        GtrError: a file has the wrong size; no curl, connection, disk space or permission; a refusal, a file that is
            not the published one, or another process at the same download.
    """
    import fcntl  # not on Windows

    target = cache_dir() / cached_name
    for candidate in (target, Path(source.default_path)):
        if candidate.is_file():
            size = candidate.stat().st_size
            if _right_size(size, source):
                return candidate
            raise GtrError(
                f"{candidate} has {_mib(size)} MiB, the published file has {source.mebibytes} MiB; "
                "delete it and run again, or give another with --checkpoint or --vae"
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f"{target.name}.lock").open("ab") as lock:  # stays: removing it would race
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GtrError(f"another process is downloading {target}; wait until it ends, then run again") from None
            if not target.is_file():  # another process may just have finished
                _download(source, target, cached_name, reporter)
    except OSError as error:
        raise GtrError(f"cannot write {target} ({error.strerror or error}); {_ELSEWHERE}") from None
    return target


def _download(source: WeightSource, target: Path, name: str, reporter: Reporter) -> None:
    part, expected = target.with_name(f"{target.name}.part"), source.mebibytes * MEBIBYTE
    if shutil.which("curl") is None:
        raise GtrError(f"downloads need curl; install it, or get {source.url} and put it at {target}, or {_ADVICE}")
    if _size(part) > expected + SIZE_TOLERANCE:  # another file's leftovers
        part.unlink()
    free, needed = shutil.disk_usage(part.parent).free, expected - _size(part)
    if free < needed:
        raise GtrError(f"{part.parent} has {_mib(free)} MiB free, the download needs {_mib(needed)} MiB; {_ELSEWHERE}")
    try:
        with reporter.bar(f"download {name}", source.mebibytes, "MiB") as bar:
            reason = _curl(source, part, name, bar)
            for pause in PAUSES:
                if reason is None:
                    break
                time.sleep(pause)
                reason = _curl(source, part, name, bar)
    except KeyboardInterrupt:
        reporter.say(f"{_mib(_size(part))} of {source.mebibytes} MiB are here; the same command goes on from there")
        raise
    if reason is not None:
        stopped = f"the download of {name} stopped at {_mib(_size(part))} of {source.mebibytes} MiB ({reason})"
        raise GtrError(f"{stopped}; run again to go on from there, or {_ADVICE}")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)


def _curl(source: WeightSource, part: Path, name: str, bar: Progressed) -> str | None:
    """One connection, which adds to ``part``: None if that is the file now, or why it is worth another try."""
    limit = source.mebibytes * MEBIBYTE + SIZE_TOLERANCE
    command = ["curl", "--silent", "--show-error", "--fail", "--location", "--continue-at", "-", "--output", str(part)]
    command += ["--proto", "=http,https", "--proto-redir", "=http,https", "--connect-timeout", "30"]
    command += ["--speed-limit", "1", "--speed-time", str(STALL_SECONDS), "--max-filesize", str(limit)]
    command += ["--write-out", "%{http_code} %{content_type}", "--url", source.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as curl:
        try:
            while curl.poll() is None and _size(part) <= limit:
                bar.to(_size(part) // MEBIBYTE)
                time.sleep(0.1)
        finally:
            curl.kill()  # does nothing to one that has ended
        told, complaint = curl.communicate()
    status, _, kind = told.partition(" ")
    reason = re.sub(r"^curl: \(\d+\) ", "", " ".join(complaint.split())) or f"curl ended with {curl.returncode}"
    arrived, page = _size(part), kind.startswith("text/html")
    code = curl.returncode if arrived <= limit else _TOO_LARGE
    nothing_after = status == "416" and arrived > 0  # what was asked for: all of it is here, or it is another file's
    if ((code == 0 and not page) or nothing_after) and _right_size(arrived, source):
        return None
    if (code == _NO_RANGES and not page) or nothing_after:
        part.unlink()
        return reason
    if code in _CUT or status in _BUSY or (code in _NO_HOST and arrived):  # a network that was there may come back
        return reason
    if code == _NOT_WRITTEN:
        raise GtrError(f"cannot write {part} ({reason}); {_ELSEWHERE}")
    if code in (0, _NO_RANGES) and page:
        reason = "the server answered with a web page instead of the file"
    elif code in (0, _TOO_LARGE):
        size = f"{_mib(arrived)} MiB" if code == 0 else "more"
        reason = f"the server's file has {size}, the published one {source.mebibytes} MiB"
    if code in (0, _TOO_LARGE):
        part.unlink(missing_ok=True)
    raise GtrError(f"cannot download {name} ({reason}); {_ADVICE}")


def _right_size(size: int, source: WeightSource) -> bool:
    return abs(size - source.mebibytes * MEBIBYTE) <= SIZE_TOLERANCE


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _mib(size: int) -> str:
    return f"{size / MEBIBYTE:.1f}"
