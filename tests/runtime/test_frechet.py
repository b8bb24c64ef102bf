"""Frechet distance against scipy's matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from gtr_deploy.runtime.errors import UsageError
from gtr_deploy.runtime.quality.frechet import feature_statistics, frechet_distance


def _sets(features: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((features, features))
    return rng.standard_normal((300, features)) @ mix + 1e4, 1.3 * rng.standard_normal((200, features)) + 1e4 + 0.2


def test_agrees_with_scipy() -> None:
    first, second = _sets()
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    difference = first.mean(axis=0) - second.mean(axis=0)
    expected = difference @ difference + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    found = frechet_distance(feature_statistics([first]), feature_statistics([second]))
    assert found == pytest.approx(expected, rel=1e-6)


def test_batches_add_up_and_order_does_not_matter() -> None:
    first, second = _sets()
    whole, parts = feature_statistics([first]), feature_statistics(np.array_split(first, 7))
    np.testing.assert_allclose(parts.covariance, whole.covariance, rtol=1e-9)
    other = feature_statistics([second])
    assert frechet_distance(whole, other) == pytest.approx(frechet_distance(other, whole))
    assert frechet_distance(whole, parts) == pytest.approx(0, abs=1e-6)


def test_singular_covariances() -> None:
    rng = np.random.default_rng(0)
    flat = np.repeat(rng.standard_normal((20, 1)), 30, axis=1)
    assert frechet_distance(feature_statistics([flat]), feature_statistics([flat + 1])) == pytest.approx(30, rel=1e-6)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([np.zeros((1, 3))], "at least 2"),
        ([np.zeros((5, 3)), np.zeros((5, 4))], r"not \[n, 3\]"),
        ([np.full((3, 3), np.nan)], "not finite"),
        ([np.zeros(3)], r"not \[n, F\]"),
    ],
)
def test_bad_features_are_one_line(batches: list, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        feature_statistics(batches)


def test_feature_counts_must_agree() -> None:
    first, second = feature_statistics([np.eye(3)]), feature_statistics([np.eye(4)])
    with pytest.raises(UsageError, match="3 and 4"):
        frechet_distance(first, second)
