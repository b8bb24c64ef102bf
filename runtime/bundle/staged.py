"""A folder that is replaced whole: one writer at a time, and a kill at any moment loses nothing."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import GtrError


def partial_folder(out: Path) -> Path:
    """Where a build of ``out`` writes until it is complete."""
    return out.with_name(out.name + ".partial")


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """One build per folder. The lock goes with the process, whatever ends it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise GtrError(
                f"another build is writing {out}; wait for it, or choose another folder with --out"
            ) from None
        yield


def settle(out: Path) -> None:
    """Finishes a swap that was cut short between its two renames (systems without an atomic exchange)."""
    aside = out.with_name(out.name + ".old")
    if aside.is_dir():
        if out.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(out)


def swap(partial: Path, out: Path) -> None:
    """Puts the finished folder in place of the old one, atomically where the system can."""
    if not out.exists():
        partial.rename(out)
        return
    if _exchange(partial, out):
        shutil.rmtree(partial)
        return
    aside = out.with_name(out.name + ".old")
    out.rename(aside)
    partial.rename(out)
    shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Linux renameat2 with RENAME_EXCHANGE; False where it is not to be had."""
    at_current_folder, rename_exchange = -100, 2
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return call(at_current_folder, os.fsencode(first), at_current_folder, os.fsencode(second), rename_exchange) == 0
