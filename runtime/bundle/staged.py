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
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ..errors import BundleError, GtrError, UsageError
from ..files import atomic_path, link_or_copy
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
    """What a run writes in place of ``out``. Hold :func:`lock` around it."""

    def __init__(self, out: Path, force: bool = False) -> None:
        settle(out)
        self.out, self.partial = out, partial_folder(out)
        if force:
            shutil.rmtree(self.partial, ignore_errors=True)
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
        """Puts ``partial`` in the place of ``out``; what has a manifest gets it last."""
        if self._done:
            _write_record(self.partial, self._done)
        if manifest is not None:
            write_manifest(self.partial, manifest)
        swap(self.partial, self.out)

    def discard(self) -> None:
        """Everything is as wanted already: removes what interrupted runs have left."""
        shutil.rmtree(self.partial, ignore_errors=True)


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


def replaceable(out: Path, model: str, precision: str, force: bool) -> Bundle | None:
    """The bundle at ``out`` that a bundle of this model and precision may replace; None if nothing is there.

    Raises:
        UsageError: ``out`` is a file.
        GtrError: something else is in the way.
    """
    settle(out)
    if out.is_file():
        raise UsageError(f"{out} is a file; choose another folder with --out")
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


def _recorded(folder: Path) -> dict[str, Stage]:
    """Empty where the record is missing or damaged: that only costs time."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=dict[str, Stage])
    except (OSError, msgspec.DecodeError, RecursionError):
        return {}


def _write_record(folder: Path, stages: Mapping[str, Stage]) -> None:
    with atomic_path(folder / RECORD) as temporary:
        temporary.write_bytes(msgspec.json.encode(stages) + b"\n")
