"""Which images a calibration runs over: classes and seeds, or a user's own latents. Refuses bad data in one line."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.backends.protocol import Floats
from ..runtime.errors import UsageError
from ..runtime.models.architecture import Architecture
from ..runtime.sampling.noise import checked_seed

FIRST_SEED = 10**9
"""Calibration's seeds start here, so that it never sees an image that evaluation judges (those count from 0)."""


@dataclass(frozen=True)
class CalibrationImages:
    """One row per image.

    Attributes:
        labels: class indices.
        seeds: image seeds.
        latents: float32 [n, L, C] that the backbone is shown along the plan's orders, in place of what it samples; None
            to let it see its own samples.
    """

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    latents: Floats | None = None

    @property
    def identity(self) -> list[Any]:
        """JSON that tells these images from others; of latents their hash."""
        digest = None if self.latents is None else hashlib.sha256(self.latents.tobytes()).hexdigest()
        return [self.labels, self.seeds, digest]


def calibration_images(
    architecture: Architecture,
    count: int,
    labels: Sequence[int] | None = None,
    first_seed: int = FIRST_SEED,
    latents: Path | None = None,
) -> CalibrationImages:
    """The images of a calibration run.

    Args:
        architecture: the model.
        count: number of images; with ``latents`` at most so many of them.
        labels: classes to go round; spread over all of them by default.
        first_seed: seed of the first image.
        latents: NPZ as ``gtr-run generate --save-latents`` writes it: ``latents`` [n, L, C] and ``labels`` [n].

    Raises:
        UsageError: no images, classes out of range, or a file with other contents.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"{count!r} calibration images: give at least 1")
    if latents is not None:
        if labels is not None:
            raise UsageError("calibration latents bring their own classes; leave the classes out")
        return _from_file(architecture, count, latents, first_seed)
    classes = architecture.classes
    if labels is None:
        chosen = [i * classes // count if count < classes else i % classes for i in range(count)]
    elif not labels:
        raise UsageError("no calibration class given")
    else:
        chosen = [labels[i % len(labels)] for i in range(count)]
    _check_labels(chosen, classes, "calibration")
    seeds = [checked_seed(first_seed + i) for i in range(count)]
    return CalibrationImages(tuple(int(label) for label in chosen), tuple(seeds))


def _check_labels(labels: Sequence[int], classes: int, what: str) -> None:
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or not 0 <= label < classes:
            raise UsageError(f"{what} class {label!r} is not in 0..{classes - 1}")


def _from_file(architecture: Architecture, count: int, path: Path, first_seed: int) -> CalibrationImages:
    try:
        with np.load(path, allow_pickle=False) as stored:
            missing = {"latents", "labels"} - set(stored.files)
            if missing:
                raise UsageError(f"{path} has no {sorted(missing)[0]}; gtr-run generate --save-latents writes both")
            latents, labels = stored["latents"], stored["labels"]
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an NPZ of latents: {str(error).splitlines()[0]}") from None
    if latents.size == 0:
        raise UsageError(f"{path} holds no images")
    tokens, channels = architecture.tokens, architecture.token_channels
    if latents.shape[1:] != (tokens, channels) or latents.dtype not in (np.float32, np.float64, np.float16):
        found = f"{latents.dtype} {list(latents.shape)}"
        raise UsageError(f"{path}: latents are {found}, {architecture.name} has floats [n, {tokens}, {channels}]")
    if labels.shape != latents.shape[:1] or labels.dtype.kind not in "iu":
        raise UsageError(f"{path}: labels are {labels.dtype} {list(labels.shape)}, not {len(latents)} integers")
    if not np.isfinite(latents).all():
        image = int(np.flatnonzero(~np.isfinite(latents).all(axis=(1, 2)))[0])
        raise UsageError(f"{path}: the latents of image {image} are not finite")
    wanted = labels[:count].tolist()
    _check_labels(wanted, architecture.classes, str(path))
    seeds = tuple(checked_seed(first_seed + i) for i in range(len(wanted)))
    return CalibrationImages(tuple(wanted), seeds, latents[:count].astype(np.float32))
