"""The metrics against plain formulas, on samples made for them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gtr_deploy.runtime.models.class_conditioner import DIGITS, ClassConditioner, imagenet
from gtr_deploy.runtime.quality.digits import (
    CLASSES,
    METRICS,
    DigitMeasure,
    DigitSample,
    DigitsMeasure,
    RealDigits,
    digit_differences,
    digit_figures,
    pairwise_distances,
    real_digits,
    resampled,
)
from gtr_deploy.runtime.quality.estimates import inception_score, normal_interval, wilson_interval
from gtr_deploy.runtime.quality.frechet import feature_statistics, frechet_distance, weighted_statistics


@pytest.fixture(scope="module")
def real() -> RealDigits:
    return real_digits()


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """[n, 64] in [0, 1] -> uint8 [n, 32, 32, 3]."""
    large = np.round(pixels.reshape(-1, 8, 8) * 255).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    return np.repeat(large[..., None], 3, axis=-1)


def _some(real: RealDigits, per_class: int = 20, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Real digits, class by class in turn, and their labels."""
    members = np.stack([np.flatnonzero(real.labels == label)[first : first + per_class] for label in range(CLASSES)])
    chosen = members.T.ravel()
    return _enlarged(real.pixels[chosen]), real.labels[chosen]


def test_labels_are_balanced() -> None:
    assert ClassConditioner(DIGITS).samples(23) == [*range(10), *range(10), 0, 1, 2]
    assert np.bincount(ClassConditioner(imagenet()).samples(50_000)).tolist() == [50] * 1000


def test_inception_score_of_known_posteriors() -> None:
    assert inception_score(np.eye(10).repeat(3, axis=0)) == pytest.approx(10)
    assert inception_score(np.full((7, 10), 0.1)) == pytest.approx(1)
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(10, 0.3), 50)
    divergence = [(row * np.log(row / p.mean(axis=0))).sum() for row in p]
    assert inception_score(p) == pytest.approx(math.exp(np.mean(divergence)))
    counts = rng.integers(0, 3, 50)
    assert inception_score(p, counts) == pytest.approx(inception_score(p.repeat(counts, axis=0)))


def test_intervals() -> None:
    assert normal_interval(3.0, [1.0]).low is None
    drawn = np.random.default_rng(0).normal(5.0, 2.0, 4000)
    estimate = normal_interval(5.0, drawn.tolist())
    assert (estimate.low, estimate.high) == pytest.approx((5 - 1.96 * 2, 5 + 1.96 * 2), abs=0.2)
    # Wilson's interval from its definition: the shares p with |share - p| = 1.96 sqrt(p (1 - p) / n).
    for share, count in ((0.93, 40), (1.0, 25), (0.0, 300)):
        found = wilson_interval(share, count)
        for end in (found.low, found.high):
            assert end is not None
            assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count), abs=1e-9)
    assert wilson_interval(1.0, 25).high == 1.0


def test_weights_are_repetitions() -> None:
    rng = np.random.default_rng(0)
    rows, counts = rng.standard_normal((40, 6)) + 3, rng.integers(0, 4, 40)
    found, wanted = weighted_statistics(rows, counts), feature_statistics([rows.repeat(counts, axis=0)])
    np.testing.assert_allclose(found.mean, wanted.mean)
    np.testing.assert_allclose(found.covariance, wanted.covariance, atol=1e-12)
    assert found.count == counts.sum()


def test_a_measure_of_weights_is_that_of_repeated_images(real: RealDigits) -> None:
    images, labels = _some(real, 6)
    sample = real.sample(images, labels)
    counts = np.tile([2, 1, 0, 1, 3, 1], 10)
    index = np.arange(60).repeat(counts)
    again = DigitSample(labels[index], sample.features[index], sample.posteriors[index], sample.nearest[index])
    found = DigitMeasure(sample, real)(counts)
    wanted = DigitMeasure(again, real)(np.ones(len(index), dtype=np.int64))
    # Diversity differs on purpose: a repeated image is no pair with itself.
    for name in ("frechet_distance", "inception_score", "class_accuracy", "nearest_ratio"):
        assert found[name] == pytest.approx(wanted[name])
    assert found["diversity_ratio"] > wanted["diversity_ratio"]


def test_the_shipped_digits_and_their_classifier(real: RealDigits) -> None:
    assert real.pixels.shape == (1797, 64)
    assert np.bincount(real.labels).min() >= 174
    sample = real.sample(_enlarged(real.pixels), real.labels)
    figures = DigitMeasure(sample, real)(np.ones(len(sample), dtype=np.int64))
    assert figures["class_accuracy"] == 1.0
    assert figures["inception_score"] > 9.8
    assert figures["frechet_distance"] < 0.01
    assert figures["nearest_ratio"] < 0.02  # what copying looks like
    assert figures["diversity_ratio"] == pytest.approx(1.0, abs=0.02)
    assert 0.9 < real.nearest < 1.2


def test_leave_one_out_is_what_it_says(real: RealDigits) -> None:
    by_hand = []
    for index in range(0, 1797, 40):
        others = np.delete(real.pixels, index, axis=0)
        by_hand.append(np.linalg.norm(others - real.pixels[index], axis=1).min())
    assert real.nearest == pytest.approx(np.mean(by_hand), rel=0.15)
    distances = pairwise_distances(real.pixels[:5], real.pixels[:7])
    assert distances[2, 6] == pytest.approx(np.linalg.norm(real.pixels[2] - real.pixels[6]))


def test_each_fault_is_seen_by_its_metric(real: RealDigits) -> None:
    images, labels = _some(real)
    good = digit_figures(real.sample(images, labels), real)
    assert set(good) == set(METRICS)
    noisy = np.clip(images.astype(int) + np.random.default_rng(0).normal(0, 90, images[..., :1].shape), 0, 255)
    noise = digit_figures(real.sample(noisy.astype(np.uint8), labels), real)
    assert noise["frechet_distance"].low > good["frechet_distance"].high
    assert noise["nearest_ratio"].value > 0.5
    wrong = digit_figures(real.sample(images, (labels + 1) % 10), real)
    assert wrong["class_accuracy"].high < 0.05
    assert wrong["frechet_distance"].value == pytest.approx(good["frechet_distance"].value)
    alike = digit_figures(real.sample(np.tile(images[:10], (20, 1, 1, 1)), labels), real)
    assert alike["diversity_ratio"].value == pytest.approx(0, abs=1e-6)
    assert alike["frechet_distance"].value > 3 * good["frechet_distance"].value
    zeros = images[labels == 0]
    only = digit_figures(real.sample(np.tile(zeros, (10, 1, 1, 1)), labels), real)
    assert only["inception_score"].value < 1.5


def test_intervals_shrink_with_more_images_and_hold_the_value(real: RealDigits) -> None:
    widths = []
    for per_class in (10, 40):
        estimate = digit_figures(real.sample(*_some(real, per_class)), real)["frechet_distance"]
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high
        widths.append(estimate.high - estimate.low)
    assert widths[1] < widths[0]


def test_paired_differences_are_tighter_than_two_intervals(real: RealDigits) -> None:
    images, labels = _some(real, 30)
    rng = np.random.default_rng(0)
    strength = rng.uniform(0, 100, (len(images), 1, 1, 1))  # some images differ from all real digits more than others
    noisy = np.clip(images + strength * rng.standard_normal((*images.shape[:3], 1)), 0, 255)
    ours, base = (real.sample((factor * noisy).astype(np.uint8), labels) for factor in (0.9, 1.0))
    found = digit_differences(ours, base, real)["nearest_ratio"]
    apart = digit_figures(ours, real)["nearest_ratio"]
    assert found.low is not None
    assert found.high is not None
    assert apart.low is not None
    assert apart.high is not None
    assert found.value == pytest.approx(apart.value - digit_figures(base, real)["nearest_ratio"].value)
    assert found.high - found.low < 0.7 * (apart.high - apart.low)
    same = digit_differences(base, base, real)
    assert all((e.low, e.value, e.high) == (0, 0, 0) for e in same.values())
    with pytest.raises(ValueError, match="same labels"):
        digit_differences(ours, real.sample(images, (labels + 1) % 10), real)


def test_bootstrap_draws_within_classes() -> None:
    labels = np.arange(35) % 10
    counts = resampled(labels, 50)
    for label in range(10):
        assert (counts[:, labels == label].sum(axis=1) == (labels == label).sum()).all()
    assert len(resampled(np.arange(15) % 10)) == 0  # a class with one image: no interval rather than a false one


def test_few_images(real: RealDigits) -> None:
    images, labels = _some(real, 1)
    figures = digit_figures(real.sample(images, labels), real)
    assert "diversity_ratio" not in figures
    assert figures["frechet_distance"].low is None


def test_batches_add_up(real: RealDigits) -> None:
    images, labels = _some(real, 5)
    whole, parts = DigitsMeasure().tally(50), DigitsMeasure().tally(50)
    whole.add(images, labels)
    for part in np.array_split(np.arange(50), 7):
        parts.add(images[part], labels[part])
    for name, estimate in whole.figures().items():
        assert parts.figures()[name].value == pytest.approx(estimate.value)
    distance = frechet_distance(feature_statistics([whole.sample().features]), real.statistics)
    assert whole.figures()["frechet_distance"].value == pytest.approx(distance)
