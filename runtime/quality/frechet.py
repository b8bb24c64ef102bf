"""Frechet distance between two sets of features: how far apart two sets of pictures are, as one number.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of Gaussians with the sets' means and covariances (Dowson and Landau,
1982; Heusel et al., 2017, for images). Knows no pictures and no classifier.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Floats64 = NDArray[np.float64]


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [F], covariance [F, F] (divided by n - 1) and number of a set of feature vectors."""

    mean: Floats64
    covariance: Floats64
    count: int


class StatisticsSum:
    """Adds up feature vectors [n, F] batch by batch; sums are float64, memory does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._shift, self._total, self._products = np.zeros(0), np.zeros(0), np.zeros((0, 0))

    def add(self, batch: NDArray) -> None:
        """One more batch [n, F]; UsageError where it does not fit those before it, or is not finite."""
        rows = np.asarray(batch, dtype=np.float64)
        if rows.ndim != 2 or (self.count and rows.shape[1] != len(self._total)):
            raise UsageError(f"features {list(rows.shape)} are not [n, {len(self._total) if self.count else 'F'}]")
        if not np.isfinite(rows).all():
            raise UsageError("a feature is not finite")
        if len(rows) == 0:
            return
        if not self.count:
            # Sums around the first batch's mean keep their digits where means are large and spreads small.
            self._shift, width = rows.mean(axis=0), rows.shape[1]
            self._total, self._products = np.zeros(width), np.zeros((width, width))
        rows = rows - self._shift
        self.count += len(rows)
        self._total += rows.sum(axis=0)
        self._products += rows.T @ rows

    def result(self) -> FeatureStatistics:
        """Mean and covariance of all of them; UsageError where there are fewer than two."""
        if self.count < 2:
            raise UsageError(f"{self.count} feature vectors: a covariance needs at least 2")
        mean = self._total / self.count
        covariance = (self._products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return FeatureStatistics(mean + self._shift, (covariance + covariance.T) / 2, self.count)


def feature_statistics(batches: Iterable[NDArray]) -> FeatureStatistics:
    """Of feature vectors [n, F] in one batch or several.

    Raises:
        UsageError: fewer than two vectors, batches that do not fit together, or values that are not finite.
    """
    sums = StatisticsSum()
    for batch in batches:
        sums.add(batch)
    return sums.result()


def weighted_statistics(features: NDArray, weights: NDArray[np.int64]) -> FeatureStatistics:
    """Of feature vectors [n, F] where row i counts ``weights[i]`` times; UsageError for fewer than two in all."""
    count = int(weights.sum())
    if count < 2:
        raise UsageError(f"{count} feature vectors: a covariance needs at least 2")
    mean = weights @ features / count
    rows = features - mean
    covariance = (rows * weights[:, None]).T @ rows / (count - 1)
    return FeatureStatistics(mean, (covariance + covariance.T) / 2, count)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """d^2, at least 0. Symmetric in its arguments.

    tr (S1 S2)^(1/2) is the trace of the root of the symmetric S1^(1/2) S2 S1^(1/2), whose eigenvalues are the same and,
    unlike those of S1 S2, stay real where a covariance is singular.

    Raises:
        UsageError: the feature counts differ.
    """
    if first.mean.shape != second.mean.shape:
        raise UsageError(f"feature vectors of {len(first.mean)} and {len(second.mean)} numbers cannot be compared")
    root = _square_root(first.covariance)
    values = np.linalg.eigvalsh(root @ second.covariance @ root)
    overlap = np.sqrt(np.maximum(values, 0)).sum()
    difference = first.mean - second.mean
    distance = difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap
    return float(max(distance, 0.0))


def _square_root(matrix: Floats64) -> Floats64:
    """Of a symmetric positive semi-definite matrix, by its eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
