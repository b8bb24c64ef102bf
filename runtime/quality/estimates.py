"""Quality of sets of pictures as numbers with intervals: what metrics share. Knows no model and no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..models.conditioning import Request

Z = 1.96
"""Half a 95 % interval in standard errors."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; without one, both ends are None."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """value, low, high."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Tally(Protocol):
    """Takes one plan's pictures batch by batch and says what they are worth."""

    def add(self, images: NDArray[np.uint8], requests: Sequence[Request]) -> None:
        """A batch uint8 [n, H, W, 3] and the n requests that it was made for."""
        ...

    def figures(self) -> dict[str, Estimate]:
        """Every metric by name; UsageError where there are too few pictures."""
        ...

    def less(self, other: Any) -> dict[str, Estimate]:
        """This one's figures less those of another tally of the same seeds and requests; empty where nothing pairs."""
        ...


class Measure(Protocol):
    """A feature space, and what pictures are compared with in it; both are named for people."""

    features: str
    reference: str

    def tally(self, images: int) -> Tally:
        """An empty one, for ``images`` pictures."""
        ...


def inception_score(posteriors: NDArray[np.float64], weights: NDArray[np.int64] | None = None) -> float:
    """exp of the mean KL divergence of class probabilities [n, K] from their mean (Salimans et al., 2016).

    Between 1 (all images alike to the classifier) and K (sure of every image, all classes equally often).

    Args:
        weights: how often each image counts; once by default.
    """
    counts = np.ones(len(posteriors)) if weights is None else weights.astype(np.float64)
    total = counts.sum()
    mean = counts @ posteriors / total
    return math.exp(max(0.0, float(counts @ negative_entropy(posteriors) / total - negative_entropy(mean[None])[0])))


def negative_entropy(posteriors: NDArray[np.float64]) -> NDArray[np.float64]:
    """sum_k p log p of each row of [n, K], with 0 log 0 = 0."""
    return (posteriors * np.log(np.maximum(posteriors, 1e-300))).sum(axis=1)


def normal_interval(value: float, resampled: Sequence[float]) -> Estimate:
    """``value`` +- 1.96 standard deviations of bootstrap values; no interval where there are fewer than two."""
    if len(resampled) < 2:
        return Estimate(value)
    reach = Z * float(np.std(resampled, ddof=1))
    return Estimate(value, value - reach, value + reach)


def wilson_interval(share: float, count: int) -> Estimate:
    """Of a share of ``count`` trials (Wilson, 1927): unlike the normal one it says something at 0 and 100 %."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Estimate(share, max(0.0, middle - reach), min(1.0, middle + reach))
