"""Running statistics and ranges, against brute force on all values."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from gtr_deploy.calibration import ranges
from gtr_deploy.calibration.ranges import BINS, Statistics, find_range, layer_ranges
from gtr_deploy.runtime.errors import BackendError, UsageError


def _values(kind: str) -> np.ndarray:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((500, 64)).astype(np.float32)
    if kind == "skewed":  # like GELU's output: a hard lower end, a long upper one
        values = np.where(values > 0, values**2, values * 0.05)
    if kind == "outliers":
        values[::50, 3] *= 20
    return values


def _seen(values: np.ndarray, parts: int = 5) -> Statistics:
    statistics = Statistics()
    for part in np.array_split(values, parts):
        statistics.add(part)
    return statistics


@pytest.mark.parametrize("kind", ["normal", "skewed", "outliers"])
def test_statistics_are_those_of_all_values_together(kind: str) -> None:
    values = _values(kind) * np.linspace(0.01, 3, 500, dtype=np.float32)[:, None]  # grows, so that bins must merge
    seen = _seen(values, 50)
    assert (seen.low, seen.high, seen.values) == (values.min(), values.max(), values.size)
    assert math.log2(seen.limit) == int(math.log2(seen.limit))
    assert seen.limit / 2 < abs(values).max() <= seen.limit
    expected, _ = np.histogram(values, bins=BINS, range=(-seen.limit, seen.limit))
    assert seen.bins.sum() == values.size
    # float32 rounding moves values that lie on an edge by one bin.
    assert np.abs(np.cumsum(seen.bins) - np.cumsum(expected)).max() <= 3
    np.testing.assert_array_equal(seen.channels, np.abs(values).max(axis=0))


def test_memory_does_not_depend_on_how_much_is_seen() -> None:
    statistics, values = Statistics(), _values("normal")
    statistics.add(values)
    tracemalloc.start()
    for _ in range(200):
        statistics.add(values)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 4 * BINS * 8


def test_large_tensors_are_sampled_but_their_extremes_are_exact() -> None:
    values = np.zeros((3 * ranges.SAMPLES // 64, 64), dtype=np.float32)
    values[1, 5], values[4, 6] = -3, 7
    seen = _seen(values, 1)
    assert (seen.low, seen.high) == (-3, 7)
    assert seen.bins.sum() <= ranges.SAMPLES + 64


def test_empty_and_constant_tensors() -> None:
    statistics = Statistics()
    statistics.add(np.zeros((2, 0, 16), dtype=np.float32))
    with pytest.raises(UsageError, match="layer: a tensor was never seen"):
        layer_ranges({"layer": statistics}, "max", True, 100)
    statistics.add(np.zeros((2, 3), dtype=np.float32))
    for method in ranges.METHODS:
        assert find_range(statistics, method, False) == ranges.Range(0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(BackendError, match="not finite"):
        Statistics().add(np.array([[1.0, bad]], dtype=np.float32))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", ["normal", "skewed", "outliers"])
def test_percentile_against_sorting(kind: str, signed: bool) -> None:
    values = _values(kind)
    seen = _seen(values)
    found, bin_width = find_range(seen, "percentile", signed, 99.0), 2 * seen.limit / BINS
    if signed:
        wanted = np.quantile(np.abs(values), 0.99, method="inverted_cdf")
        assert found.low == -found.high
        assert abs(found.high - wanted) <= 2 * bin_width
    else:
        low, high = np.quantile(values, [0.005, 0.995], method="inverted_cdf")
        assert abs(found.high - high) <= 2 * bin_width
        assert abs(found.low - low) <= 2 * bin_width


def _error(values: np.ndarray, found: ranges.Range, signed: bool) -> float:
    step = (found.high - found.low) / (254 if signed else 255)
    zero = round(-found.low / step)
    levels = np.clip(np.rint(values / step) + zero, 0, 254 if signed else 255)
    return float(np.square(values - (levels - zero) * step).mean())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", ["normal", "skewed", "outliers"])
def test_mse_is_as_good_as_a_search_over_all_values(kind: str, signed: bool) -> None:
    values = _values(kind)
    found = find_range(_seen(values), "mse", signed)
    outer = find_range(_seen(values), "max", signed)
    shares = np.linspace(0.05, 1, 60)
    if signed:
        tried = [ranges.Range(outer.low * s, outer.high * s) for s in shares]
    else:
        tried = [ranges.Range(outer.low * a, outer.high * b) for a in shares[::3] for b in shares[::3]]
    assert _error(values, found, signed) <= 1.05 * min(_error(values, each, signed) for each in tried)
    assert _error(values, found, signed) <= _error(values, outer, signed)


def test_entropy_clips_outliers_and_leaves_a_uniform_range_alone() -> None:
    assert find_range(_seen(_values("outliers")), "entropy", True).high < 0.8 * np.abs(_values("outliers")).max()
    uniform = np.random.default_rng(0).uniform(-1, 1, (4000, 16)).astype(np.float32)
    assert find_range(_seen(uniform), "entropy", True).high > 0.95


def test_stored_statistics_come_back() -> None:
    seen = _seen(_values("skewed"))
    again = Statistics.of(seen.numbers(), seen.bins, seen.channels)
    assert find_range(again, "mse", False) == find_range(seen, "mse", False)
    with pytest.raises(UsageError, match="damaged"):
        Statistics.of(seen.numbers()[:2], seen.bins, seen.channels)
