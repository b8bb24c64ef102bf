"""A folder that is made in stages and replaced whole: one writer at a time, and a kill at any moment loses nothing.

Stages are written into ``<out>.partial`` and recorded there as they finish, each under a key: the hash of what it
depends on. The next run adopts what it finds under the same key, there or in the folder that it replaces. Knows what a
manifest is, not what the stages do.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ..errors import BundleError, GtrError, UsageError
from ..files import atomic_path, link_or_copy, sweep
from .manifest import MANIFEST, Manifest, StoredFile, write_manifest
from .reader import Bundle

RECORD = "stages.json"
"""Name to :class:`Stage`. It stays in the finished folder, for the next run; no reader of a bundle needs it."""


class Stage(Struct, frozen=True, forbid_unknown_fields=True):
    """A finished stage.

    Attributes:
        key: hash of what it depends on.
        files: relative to the staged folder.
        seconds: what it took, where that is kept.
        counts: what it found out, such as an engine's layers per precision.
    """

    key: str
    files: Annotated[tuple[StoredFile, ...], Meta(min_length=1)]
    seconds: float = 0.0
    counts: Mapping[str, int] = {}


class StagedFolder:
    """What a run writes in place of ``out``. Hold :func:`lock` around it.

    Raises:
        GtrError: the place beside ``out`` is taken by something that no build has left.
    """

    def __init__(self, out: Path, force: bool = False) -> None:
        settle(out)
        self.out, self.partial = out, partial_folder(out)
        _claim(self.partial)
        if force:
            remove_own(self.partial)
            _claim(self.partial)
        (self.partial / MANIFEST).unlink(missing_ok=True)
        self._left = {self.partial: _recorded(self.partial), out: {} if force else _recorded(out)}
        self._done: dict[str, Stage] = {}

    def adopt(self, name: str, key: str) -> Stage | None:
        """The stage as an interrupted run or the old folder has it, its files now in ``partial``; None if they differ
        or are not sound."""
        for folder, stages in self._left.items():
            stage = stages.get(name)
            if stage is not None and stage.key == key and all(take(s, folder, self.partial) for s in stage.files):
                return self.keep(name, stage)
        return None

    def keep(self, name: str, stage: Stage) -> Stage:
        """Records a stage whose files are in ``partial``."""
        # Stages of the interrupted run that this one has not come to yet stay on record.
        self._done[name] = self._left[self.partial][name] = stage
        _write_record(self.partial, self._left[self.partial])
        return stage

    def publish(self, manifest: Manifest | None = None) -> None:
        """Puts ``partial`` in the place of ``out``: what the stages and the manifest list, and nothing else that
        interrupted runs have left. What has a manifest gets it last."""
        _write_record(self.partial, self._done)
        wanted = {RECORD, *(stored.file for stage in self._done.values() for stored in stage.files)}
        if manifest is not None:
            wanted |= {stored.file for stored in manifest.files}
            wanted |= {f"engines/{engines.key}/{RECORD}" for engines in manifest.engines}
        for path in sorted(self.partial.rglob("*"), reverse=True):  # files before their folders
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.partial).as_posix() not in wanted:
                path.unlink()
        if manifest is not None:
            write_manifest(self.partial, manifest)
        swap(self.partial, self.out)

    def discard(self) -> None:
        """Everything is as wanted already: removes what interrupted runs have left."""
        remove_own(self.partial)


def stage_key(**depends: Any) -> str:
    """Hash of what a stage depends on; JSON values."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def take(stored: StoredFile, source: Path, target: Path) -> bool:
    """Brings a file from one folder into another, which may be the same. False if it is not what it was."""
    try:
        path, wanted = stored.check(source), target / stored.file
    except BundleError:
        return False
    if path.resolve() != wanted.resolve():
        link_or_copy(path, wanted)
    return True


def destination(out: Path) -> Path:
    """Where a folder that is to be replaced whole really lies, links followed; tried before any work is done.

    Raises:
        UsageError: it can never be replaced.
    """
    try:
        real = out.resolve()
    except (OSError, RuntimeError):
        raise UsageError(f"{out} is a link that leads nowhere; choose another folder with --out") from None
    here = Path.cwd()
    if not real.name or real == here or real in here.parents:
        raise UsageError(f"{out} is the current folder or one above it; give the bundle a folder of its own with --out")
    if real.exists() and not real.is_dir():
        raise UsageError(f"{out} is a file; choose another folder with --out")
    if real.is_mount():
        raise UsageError(f"{out} is a mount point and cannot be replaced; choose a folder inside it with --out")
    return real


def replaceable(out: Path, model: str, precision: str, force: bool) -> Bundle | None:
    """The bundle at ``out`` that a bundle of this model and precision may replace; None if nothing is there.

    Raises:
        GtrError: something else is in the way.
    """
    settle(out)
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        old = Bundle.load(out)
    except BundleError as error:
        has_manifest = (out / MANIFEST).is_file()
        if has_manifest and force:
            return None
        hint = "--force replaces it" if has_manifest else "choose another folder with --out"
        raise GtrError(f"{out} is in the way ({error}); {hint}") from None
    found, wanted = (old.architecture.name, old.precision), (model, precision)
    if found != wanted and not force:
        difference = f"{out} holds {' '.join(found)}, this build is {' '.join(wanted)}"
        raise GtrError(f"{difference}; --force replaces it, --out puts it elsewhere")
    return old


def partial_folder(out: Path) -> Path:
    """Where a build of ``out`` writes until it is complete."""
    return out.with_name(out.name + ".partial")


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """One build per folder. The lock goes with the process, whatever ends it."""
    import fcntl  # not on Windows, where bundles are read, not built

    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise GtrError(f"cannot lock {out} with {path} ({error.strerror}); move that out of the way") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise FileNotFoundError  # its last holder has just removed it
        except OSError:
            raise GtrError(
                f"another build is writing {out}; wait for it, or choose another folder with --out"
            ) from None
        try:
            yield
        finally:
            if not os.fstat(descriptor).st_size:  # one with something in it is not ours
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def settle(out: Path) -> None:
    """Finishes a swap that was cut short between its two renames (systems without an atomic exchange)."""
    aside = _aside(out)
    if (aside / RECORD).is_file():
        if out.exists():
            remove_own(aside)
        else:
            aside.rename(out)


def swap(partial: Path, out: Path) -> None:
    """Puts the finished folder in place of the old one, atomically where the system can."""
    if not out.exists():
        partial.rename(out)
        return
    if not (out / RECORD).is_file():
        _write_record(out, {})
    if _exchange(partial, out):
        remove_own(partial)
        return
    aside = _aside(out)
    out.rename(aside)
    partial.rename(out)
    remove_own(aside)


def remove_own(folder: Path) -> None:
    """Removes a folder that carries our record: the manifest first, so that nobody takes the rest for a bundle, and the
    record last, so that a kill in between leaves something that the next run knows as its own, or an empty folder."""
    if not (folder / RECORD).is_file():
        with suppress(OSError):
            folder.rmdir()
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != RECORD:
            entry.unlink()
    (folder / RECORD).unlink()
    folder.rmdir()


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.gtr-old")


def _claim(partial: Path) -> None:
    """Makes the folder, with a record, by which it is known as ours."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise GtrError(f"{partial} is in the way and no build has left it; move it, or choose another --out")
    partial.mkdir(parents=True, exist_ok=True)
    sweep(partial)
    if not (partial / RECORD).is_file():
        if any(partial.iterdir()):
            raise GtrError(f"{partial} is in the way and no build has left it; move it, or choose another --out")
        _write_record(partial, {})


def _exchange(first: Path, second: Path) -> bool:
    """Linux renameat2 with RENAME_EXCHANGE; False where it is not to be had."""
    at_current_folder, rename_exchange = -100, 2
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return call(at_current_folder, os.fsencode(first), at_current_folder, os.fsencode(second), rename_exchange) == 0


def _recorded(folder: Path) -> dict[str, Stage]:
    """Empty where the record is missing or damaged: that only costs time."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=dict[str, Stage])
    except (OSError, msgspec.DecodeError, RecursionError):
        return {}


def _write_record(folder: Path, stages: Mapping[str, Stage]) -> None:
    with atomic_path(folder / RECORD) as temporary:
        temporary.write_bytes(msgspec.json.encode(stages) + b"\n")
