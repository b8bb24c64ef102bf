"""Which images a calibration runs over: classes and seeds, or a user's own latents. Refuses bad data in one line."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import UsageError
from ..runtime.models.architecture import Architecture
from ..runtime.models.conditioning import Arrays, Conditioner, Request
from ..runtime.sampling.chains import Floats
from ..runtime.sampling.noise import checked_seed

FIRST_SEED = 10**9
"""Calibration's seeds start here, so that it never sees an image that evaluation judges (those count from 0)."""


@dataclass(frozen=True)
class CalibrationImages:
    """One row per image.

    Attributes:
        requests: what each image is asked to be.
        conditioning: the backbone's inputs that say so, each [2, n, ...].
        seeds: image seeds.
        latents: float32 [n, L, C] that the backbone is shown along the plan's orders, in place of what it samples; None
            to let it see its own samples.
    """

    requests: tuple[Request, ...]
    conditioning: Arrays
    seeds: tuple[int, ...]
    latents: Floats | None = None

    def part(self, rows: slice) -> CalibrationImages:
        """Some of the images."""
        asked = {name: array[:, rows] for name, array in self.conditioning.items()}
        latents = None if self.latents is None else self.latents[rows]
        return CalibrationImages(self.requests[rows], asked, self.seeds[rows], latents)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything about them that statistics depend on; plain values."""
        arrays = {**self.conditioning, **({} if self.latents is None else {"latents": self.latents})}
        digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
        return {"seeds": list(self.seeds), **digests}


def calibration_images(
    architecture: Architecture,
    conditioner: Conditioner,
    count: int,
    requests: Sequence[Request] | None = None,
    first_seed: int = FIRST_SEED,
    latents: Path | None = None,
) -> CalibrationImages:
    """The images of a calibration run.

    Args:
        count: number of images; with ``latents`` at most so many of them.
        requests: what to go round; spread over all that there is by default.
        latents: NPZ as ``gtr-run generate --save-latents`` writes it: ``latents`` [n, L, C] and what they were asked to
            be.

    Raises:
        UsageError: no images, requests out of range, or a file with other contents.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"{count!r} calibration images: give at least 1")
    given = None
    if latents is not None:
        if requests is not None:
            raise UsageError("calibration latents bring their own classes; leave the classes out")
        given, chosen = _from_file(architecture, conditioner, count, latents)
    elif requests is None:
        chosen = conditioner.samples(count, spread=True)
    elif not requests:
        raise UsageError("no calibration class given")
    else:
        chosen = [conditioner.checked(requests[i % len(requests)]) for i in range(count)]
    seeds = tuple(checked_seed(first_seed + i) for i in range(len(chosen)))
    return CalibrationImages(tuple(chosen), conditioner.arrays(chosen), seeds, given)


def _from_file(
    architecture: Architecture, conditioner: Conditioner, count: int, path: Path
) -> tuple[Floats, list[Request]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            if "latents" not in stored.files:
                raise UsageError(f"{path} has no latents; gtr-run generate --save-latents writes them")
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an NPZ of latents: {str(error).splitlines()[0]}") from None
    latents = arrays["latents"]
    if latents.size == 0:
        raise UsageError(f"{path} holds no images")
    tokens, channels = architecture.tokens, architecture.token_channels
    if latents.shape[1:] != (tokens, channels) or latents.dtype not in (np.float32, np.float64, np.float16):
        found = f"{latents.dtype} {list(latents.shape)}"
        raise UsageError(f"{path}: latents are {found}, {architecture.name} has floats [n, {tokens}, {channels}]")
    if not np.isfinite(latents).all():
        image = int(np.flatnonzero(~np.isfinite(latents).all(axis=(1, 2)))[0])
        raise UsageError(f"{path}: the latents of image {image} are not finite")
    try:
        requests = conditioner.restored(arrays, len(latents))[:count]
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return latents[:count].astype(np.float32), requests
