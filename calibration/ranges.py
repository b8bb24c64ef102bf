"""Running statistics of a tensor, and the range that each calibration method takes from them.

Memory does not depend on how much has been seen: exact smallest and largest value, and a histogram whose bins merge in
pairs when the values outgrow it, so that no value ever changes its bin by interpolation. onnxruntime.quantization's
calibrators keep every activation until the end (onnxruntime #10503, #21979), which is why they are not used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import BackendError, UsageError

METHODS = ("max", "percentile", "entropy", "mse")

BINS = 8192
"""Bins over [-limit, limit]; 32 for each of 256 levels where the range is the whole of it."""

SAMPLES = 2**18
"""About the most values of one call that enter the histogram, as evenly spaced rows; the extremes are those of all."""

DEFAULT_PERCENTILE = 99.99

_LEVELS = 256
#: Clipping candidates of the searching methods, as shares of the observed range.
_SHARES = np.concatenate([np.linspace(0.02, 0.2, 13)[:-1], np.linspace(0.2, 1.0, 81)])


@dataclass(frozen=True)
class Range:
    """What a quantised activation must hold; symmetric ones have low = -high."""

    low: float
    high: float


@dataclass
class Statistics:
    """Of one tensor; grows with :meth:`add`.

    Attributes:
        low, high: extremes of all values seen.
        limit: the histogram covers [-limit, limit]; a power of two, 0 before the first value.
        bins: int64 [BINS], counts.
        values: number of values seen, those between the samples included.
        channels: float32 [last axis], largest magnitude of each channel among the samples; empty before the first.
    """

    low: float = math.inf
    high: float = -math.inf
    limit: float = 0.0
    bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    values: int = 0
    channels: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    def add(self, tensor: NDArray[Any]) -> None:
        """One call's values [..., K]; an empty tensor changes nothing.

        Raises:
            BackendError: a value is not finite.
        """
        if tensor.size == 0:
            return
        rows = tensor.reshape(-1, tensor.shape[-1])
        low, high = float(rows.min()), float(rows.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise BackendError("a value is not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.values += rows.size
        self._cover(max(-low, high))
        rows = rows[:: -(-rows.size // SAMPLES)].astype(np.float32)
        channels = np.maximum(rows.max(axis=0), -rows.min(axis=0))
        self.channels = np.maximum(self.channels, channels) if self.channels.size else channels
        # The halves keep 0 on an edge; the largest value of all belongs to the last bin.
        index = (rows * np.float32(BINS / 2 / self.limit) + np.float32(BINS / 2)).astype(np.int32)
        self.bins += np.bincount(np.minimum(index, BINS - 1).reshape(-1), minlength=BINS)

    def _cover(self, largest: float) -> None:
        """Widens the histogram until it holds ``largest``: each doubling of the limit merges neighbouring bins."""
        if self.limit == 0.0:
            # A tensor of zeros has some limit too; what comes later widens it.
            self.limit = 2.0 ** math.ceil(math.log2(max(largest, 1e-6)))
        while largest > self.limit:
            merged = self.bins.reshape(-1, 2).sum(axis=1)
            self.bins = np.zeros(BINS, dtype=np.int64)
            self.bins[BINS // 4 : BINS // 4 + BINS // 2] = merged
            self.limit *= 2

    @property
    def centres(self) -> NDArray[np.float64]:
        """Middle of each bin."""
        return ((np.arange(BINS) + 0.5 - BINS / 2) * (2 * self.limit / BINS)).astype(np.float64)

    def numbers(self) -> NDArray[np.float64]:
        """[low, high, limit, values], for storing beside ``bins`` and ``channels``."""
        return np.array([self.low, self.high, self.limit, self.values], dtype=np.float64)

    @classmethod
    def of(cls, numbers: NDArray[np.float64], bins: NDArray[np.int64], channels: NDArray[np.float32]) -> Statistics:
        """What was stored.

        Raises:
            UsageError: it is damaged.
        """
        if numbers.shape != (4,) or bins.shape != (BINS,) or channels.ndim != 1 or not np.isfinite(numbers[2:]).all():
            raise UsageError("stored activation statistics are damaged; calibrate again")
        low, high, limit, values = (float(number) for number in numbers)
        return cls(low, high, limit, bins.astype(np.int64), int(values), channels.astype(np.float32))


def find_range(statistics: Statistics, method: str, signed: bool, percentile: float = DEFAULT_PERCENTILE) -> Range:
    """The range of a tensor.

    Args:
        statistics: of at least one value.
        method: ``max``: all of it. ``percentile``: the middle ``percentile`` percent. ``mse``: least squared error of
            the quantised values. ``entropy``: least Kullback-Leibler divergence of the quantised distribution from the
            real one (TensorRT's classic calibration, S. Migacz, GTC 2017). The last two know integers only: E4M3's
            levels are finer near 0.
        signed: symmetric around 0 with 255 levels, else from low to high, 0 included, with 256.
        percentile: in 50..100, of method ``percentile``.
    """
    low, high = _outer(statistics, signed)
    if method == "max" or low == high:
        return Range(low, high)
    if method == "percentile":
        return _percentile(statistics, signed, percentile)
    return _search(statistics, signed, low, high, _squared_error if method == "mse" else _divergence)


def _outer(statistics: Statistics, signed: bool) -> tuple[float, float]:
    if signed:
        largest = max(-statistics.low, statistics.high, 0.0)
        return -largest, largest
    return min(statistics.low, 0.0), max(statistics.high, 0.0)


def _percentile(statistics: Statistics, signed: bool, percentile: float) -> Range:
    """Outer edge of the bin where the wanted share is reached."""
    low, high = _outer(statistics, signed)
    counts, width = statistics.bins, 2 * statistics.limit / BINS
    if signed:
        folded = counts[BINS // 2 :] + counts[: BINS // 2][::-1]
        edge = (_reached(folded, percentile / 100) + 1) * width
        return Range(-min(edge, high), min(edge, high))
    tail = (100 - percentile) / 200
    upper = (_reached(counts, 1 - tail) + 1) * width - statistics.limit
    lower = statistics.limit - (_reached(counts[::-1], 1 - tail) + 1) * width
    return Range(max(low, min(lower, 0.0)), min(high, max(upper, 0.0)))


def _reached(counts: NDArray[np.int64], share: float) -> int:
    """Index of the first bin at which ``share`` of all counts is reached."""
    total = np.cumsum(counts)
    return int(np.searchsorted(total, share * total[-1] * (1 - 1e-12)))


Loss = Callable[[NDArray[np.float64], NDArray[np.float64], float, float, int], float]


def _search(statistics: Statistics, signed: bool, low: float, high: float, loss: Loss) -> Range:
    """The candidate of least loss: one clipping share, or one for each end in turn."""
    used = np.flatnonzero(statistics.bins)
    window = slice(used[0], used[-1] + 1)
    centres, counts = statistics.centres[window], statistics.bins[window].astype(np.float64)

    def best(candidates: list[tuple[float, float]]) -> tuple[float, float]:
        losses = [loss(centres, counts, a, b, _LEVELS - signed) for a, b in candidates]
        return candidates[int(np.argmin(losses))]

    if signed:
        return Range(*best([(low * share, high * share) for share in _SHARES]))
    low, high = best([(low * share, high * share) for share in _SHARES])
    outer_low, outer_high = _outer(statistics, signed)
    for _ in range(2):
        low, high = best([(low, outer_high * share) for share in _SHARES])
        low, high = best([(outer_low * share, high) for share in _SHARES])
    return Range(low, high)


def _levels(centres: NDArray[np.float64], low: float, high: float, levels: int) -> tuple[NDArray[np.int64], float]:
    """Level of each bin, 0..levels-1, and the step between levels. 0 is a level, as in the quantised graph."""
    step = max((high - low) / (levels - 1), 1e-12)
    zero = round(-low / step)
    return np.clip(np.rint(centres / step).astype(np.int64) + zero, 0, levels - 1), step


def _squared_error(
    centres: NDArray[np.float64], counts: NDArray[np.float64], low: float, high: float, levels: int
) -> float:
    level, step = _levels(centres, low, high, levels)
    return float(counts @ (centres - (level - round(-low / step)) * step) ** 2)


def _divergence(
    centres: NDArray[np.float64], counts: NDArray[np.float64], low: float, high: float, levels: int
) -> float:
    """KL(P || Q): P clipped to the range, its tails on the outermost bins; Q spreads each level's mass over its bins
    that hold anything inside the range."""
    inside = (centres >= low) & (centres <= high)
    if inside.sum() < 2:
        return math.inf
    clipped = counts[inside].copy()
    level, _ = _levels(centres[inside], low, high, levels)
    held = clipped > 0
    mass = np.bincount(level, weights=clipped, minlength=levels)
    spread = np.maximum(np.bincount(level, weights=held, minlength=levels), 1)
    clipped[0] += counts[centres < low].sum()
    clipped[-1] += counts[centres > high].sum()
    q = np.where(held, mass[level] / spread[level], 0.0)
    if q.sum() == 0:
        return math.inf
    p, q = clipped / clipped.sum(), q / q.sum()
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / np.maximum(q[some], 1e-9))))


def layer_ranges(
    statistics: Mapping[str, Statistics], method: str, signed: bool, percentile: float
) -> dict[str, Range]:
    """Layer name to range, see :func:`find_range`.

    Raises:
        UsageError: nothing was seen of a layer.
    """
    for name, seen in statistics.items():
        if seen.values == 0:
            raise UsageError(f"{name}: a tensor was never seen during calibration; use a plan that runs every layer")
    return {name: find_range(seen, method, signed, percentile) for name, seen in statistics.items()}
