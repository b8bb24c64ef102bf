"""How good ImageNet pictures are: FID and Inception score in the published protocol, summed up picture by picture.

The network is not the runtime's: it is found through an entry point. Here are the sums, which need the same memory for
50 pictures and for 50,000, and the reading of reference statistics.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GtrError, UsageError
from ..models.conditioning import Request
from .estimates import Estimate, Z, negative_entropy
from .frechet import FeatureStatistics, StatisticsSum, frechet_distance

FEATURES = 2048
SPLITS = 10
"""Parts of the pictures that the Inception score is taken of, one by one, as is usual (Salimans et al., 2016)."""
ENTRY_POINTS = "gtr_deploy.features"
INSTALL = "pip install 'gtr-deploy[evaluate]'"

Extract = Callable[[NDArray[np.uint8]], tuple[NDArray[Any], NDArray[Any]]]
"""Pictures uint8 [n, H, W, 3] to features [n, 2048] and class probabilities [n, K]."""


class InceptionMeasure:
    """ImageNet pictures against reference statistics, see :func:`read_reference` and :func:`open_inception`."""

    def __init__(self, reference: Path, weights: Path | None = None, device: str | None = None) -> None:
        self.features = "Inception-v3 (2015-12-05), 2048 numbers of its last pooling layer, by torch-fidelity"
        self.reference = str(reference)
        self._statistics = read_reference(reference)
        self._extract = open_inception(weights, device)

    def tally(self, images: int) -> InceptionTally:
        """An empty one."""
        return InceptionTally(self._statistics, self._extract, images)


class InceptionTally:
    """See :class:`estimates.Tally`."""

    def __init__(self, reference: FeatureStatistics, extract: Extract, images: int) -> None:
        self._reference, self._extract, self._images = reference, extract, images
        self._sums = StatisticsSum()
        splits = min(SPLITS, images)
        self._counts, self._entropies = np.zeros(splits), np.zeros(splits)
        self._posteriors: NDArray[np.float64] | None = None

    def add(self, images: NDArray[np.uint8], requests: Sequence[Request]) -> None:
        features, posteriors = self._extract(images)
        posteriors = np.asarray(posteriors, dtype=np.float64)
        splits = len(self._counts)
        index = (self._sums.count + np.arange(len(images))) * splits // self._images
        if self._posteriors is None:
            self._posteriors = np.zeros((splits, posteriors.shape[1]))
        np.add.at(self._posteriors, index, posteriors)
        np.add.at(self._entropies, index, negative_entropy(posteriors))
        np.add.at(self._counts, index, 1)
        self._sums.add(features)

    def figures(self) -> dict[str, Estimate]:
        """FID without an interval, and the Inception score: mean of the splits +- 1.96 standard errors.

        Raises:
            UsageError: fewer than two pictures, or some are still missing.
        """
        distance = frechet_distance(self._sums.result(), self._reference)
        if self._sums.count != self._images or self._posteriors is None:
            raise UsageError(f"{self._sums.count} of {self._images} pictures were added")
        means = self._posteriors / self._counts[:, None]
        scores = np.exp(np.maximum(0.0, self._entropies / self._counts - negative_entropy(means)))
        value = float(scores.mean())
        reach = Z * float(scores.std(ddof=1)) / math.sqrt(len(scores))
        return {
            "frechet_distance": Estimate(distance),
            "inception_score": Estimate(value, value - reach, value + reach),
        }

    def less(self, other: InceptionTally) -> dict[str, Estimate]:
        """Nothing: single pictures are not kept."""
        return {}


def read_reference(path: Path) -> FeatureStatistics:
    """Mean and covariance of Inception features, as ADM's npz files have them (keys mu [2048], sigma [2048, 2048]).

    MAR's repository has them as fid_stats/adm_in256_stats.npz; other keys are not read.

    Raises:
        GtrError: the file cannot be read, lacks a key, or holds something else under it; one line.
    """
    arrays: dict[str, NDArray[np.float64]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name.removesuffix(".npy") for name in archive.namelist())
            for key, shape in (("mu", (FEATURES,)), ("sigma", (FEATURES, FEATURES))):
                if key not in names:
                    images = "; pictures (arr_0) are not enough" if "arr_0" in names else ""
                    raise GtrError(f"--reference {path} has {', '.join(names)[:80]} and no {key}{images}")
                # Looked at before it is unpacked: a small file can claim any size.
                if archive.getinfo(f"{key}.npy").file_size > 8 * math.prod(shape) + 4096:
                    raise GtrError(f"--reference {path}: {key} is larger than {list(shape)} numbers")
                with archive.open(f"{key}.npy") as member:
                    arrays[key] = np.lib.format.read_array(member, allow_pickle=False)
                if arrays[key].shape != shape or arrays[key].dtype.kind != "f":
                    found = f"{arrays[key].dtype} {list(arrays[key].shape)}"
                    raise GtrError(f"--reference {path}: {key} is {found}, not float {list(shape)}")
                if not np.isfinite(arrays[key]).all():
                    raise GtrError(f"--reference {path}: {key} has values that are not finite")
    except zipfile.BadZipFile:
        raise GtrError(f"--reference {path} is not an npz file") from None
    except (ValueError, EOFError, OSError, RuntimeError) as error:
        raise GtrError(f"--reference {path} cannot be read: {error}") from None
    sigma = arrays["sigma"].astype(np.float64)
    if not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-5) or sigma.trace() <= 0:
        raise GtrError(f"--reference {path}: sigma is not a covariance (not symmetric, or no spread)")
    return FeatureStatistics(arrays["mu"].astype(np.float64), (sigma + sigma.T) / 2, 0)


def open_inception(weights: Path | None, device: str | None) -> Extract:
    """The network, through its entry point.

    Args:
        weights: its file; torch-fidelity's own, downloaded, if None.
        device: ``cpu`` or ``cuda:0``; CUDA where there is one if None.

    Raises:
        GtrError: it is not installed, or cannot be opened.
    """
    missing = f"Inception features come with torch-fidelity; {INSTALL}"
    points = tuple(entry_points(group=ENTRY_POINTS, name="inception"))
    if not points:
        raise GtrError(missing)
    try:
        open_features = points[0].load()
    except ImportError as cause:
        raise GtrError(f"{missing} ({cause})") from None
    return open_features(weights, device)
