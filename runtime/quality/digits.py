"""How good mar-digits' pictures are, next to the 1,797 real digits that it was trained on. Needs NumPy only.

Features are the last hidden layer (32 numbers) of a perceptron of 64-100-32-10 units, fitted to all real digits by
examples/digits/features.py; its weights and the digits lie in data/digits.npz (UCI Optical Recognition of Handwritten
Digits, E. Alpaydin and C. Kaynak, 1998, CC BY 4.0, as scikit-learn ships it). Generated images are averaged down to
8x8 pixels first, so that nothing sees more detail than the real digits have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models.class_conditioner import DIGITS, ClassConditioner
from ..models.conditioning import Conditioner, Request
from .estimates import Estimate, inception_score, normal_interval, wilson_interval
from .frechet import FeatureStatistics, Floats64, feature_statistics, frechet_distance, weighted_statistics

DATA = Path(__file__).parent / "data" / "digits.npz"
CLASSES = 10
METRICS = ("frechet_distance", "inception_score", "class_accuracy", "nearest_ratio", "diversity_ratio")
DIVERSITY_IMAGES = 200
"""Images of each class whose pairwise distances are taken; the first ones, so that work stays bounded."""
RESAMPLES = 200
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class DigitSample:
    """What is kept of n images: 43 numbers and a label each, no pixels.

    Attributes:
        labels: int64 [n], what was asked for.
        features, posteriors: [n, 32], and class probabilities [n, 10].
        nearest: [n], distance to the nearest real digit: Euclidean over 64 pixels in [0, 1].
    """

    labels: NDArray[np.int64]
    features: Floats64
    posteriors: Floats64
    nearest: Floats64

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def joined(cls, parts: Sequence[DigitSample]) -> DigitSample:
        """All images of several samples."""
        names = ("labels", "features", "posteriors", "nearest")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class RealDigits:
    """The real digits and the classifier that was fitted to them.

    Attributes:
        pixels: [1797, 64] in [0, 1].
        layers: weights [in, out] and biases [out] of the perceptron.
        statistics: of the real digits' features.
        nearest: mean distance of a real digit to its nearest other one.
        diversity: mean distance of the features of two real digits of one class.
    """

    pixels: Floats64
    labels: NDArray[np.int64]
    layers: tuple[tuple[Floats64, Floats64], ...]
    statistics: FeatureStatistics
    nearest: float
    diversity: float

    @classmethod
    def read(cls, path: Path = DATA) -> RealDigits:
        """The digits that ship with the package, and the figures of theirs that images are compared with."""
        with np.load(path, allow_pickle=False) as stored:
            pixels = stored["images"].reshape(-1, 64).astype(np.float64) / 16
            labels = stored["labels"].astype(np.int64)
            count = len([name for name in stored.files if name.startswith("weights")])
            kinds = ("weights", "bias")
            weights, biases = ([stored[f"{kind}{i}"].astype(np.float64) for i in range(count)] for kind in kinds)
            layers = tuple(zip(weights, biases, strict=True))
        features, _ = classify(layers, pixels)
        distances = pairwise_distances(pixels, pixels)
        np.fill_diagonal(distances, np.inf)
        blocks = [pairwise_distances(own, own) for own in (features[labels == label] for label in range(CLASSES))]
        spread = [block.sum() / (len(block) * (len(block) - 1)) for block in blocks]
        nearest = float(distances.min(axis=1).mean())
        return cls(pixels, labels, layers, feature_statistics([features]), nearest, float(np.mean(spread)))

    def sample(self, images: NDArray[np.uint8], labels: Sequence[int] | NDArray[np.int64]) -> DigitSample:
        """What is kept of images uint8 [n, 32, 32, 3] that were asked to be ``labels``."""
        pixels = small_images(images)
        features, posteriors = classify(self.layers, pixels)
        nearest = pairwise_distances(pixels, self.pixels).min(axis=1)
        return DigitSample(np.asarray(labels, dtype=np.int64), features, posteriors, nearest)


@lru_cache(maxsize=1)
def real_digits() -> RealDigits:
    """The shipped digits, read once."""
    return RealDigits.read()


def small_images(images: NDArray[np.uint8]) -> Floats64:
    """uint8 [n, H, W, 3] -> [n, 64] in [0, 1], averaged over squares; H and W are multiples of 8 (mar-digits: 32)."""
    grey = images[..., 0].astype(np.float64) / 255
    height, width = images.shape[1] // 8, images.shape[2] // 8
    return grey.reshape(-1, 8, height, 8, width).mean(axis=(2, 4)).reshape(-1, 64)


def classify(layers: Sequence[tuple[Floats64, Floats64]], pixels: Floats64) -> tuple[Floats64, Floats64]:
    """[n, 64] -> features [n, 32] (ReLU between layers) and class probabilities [n, 10] (softmax)."""
    values = pixels
    for weights, bias in layers[:-1]:
        values = np.maximum(values @ weights + bias, 0)
    weights, bias = layers[-1]
    logits = values @ weights + bias
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return values, exponentials / exponentials.sum(axis=1, keepdims=True)


def pairwise_distances(first: Floats64, second: Floats64) -> Floats64:
    """Euclidean, [n, F] and [m, F] -> [n, m]."""
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    distances = np.sqrt(np.maximum(squares, 0))
    if first is second:
        np.fill_diagonal(distances, 0.0)  # rounding would leave some 1e-8 there
    return distances


class DigitMeasure:
    """The metrics of one sample, for any weights of its images: those of bootstrap samples are counts."""

    def __init__(self, sample: DigitSample, real: RealDigits) -> None:
        self._sample, self._real = sample, real
        self._right = sample.posteriors.argmax(axis=1) == sample.labels
        members = [np.flatnonzero(sample.labels == label)[:DIVERSITY_IMAGES] for label in range(CLASSES)]
        self._classes = [(own, pairwise_distances(*[sample.features[own]] * 2)) for own in members if len(own) > 1]

    def __call__(self, weights: NDArray[np.int64]) -> dict[str, float]:
        """Every metric of :data:`METRICS` but diversity where no class has two images, with image i counted [i] times.

        ``nearest_ratio``: mean distance to the nearest real digit, over the same of real digits (leave-one-out); a
        generator that copies its training images is near 0. ``diversity_ratio``: mean distance of two images of one
        class in feature space, over the same of real digits; one image per class gives 0.
        """
        sample, real = self._sample, self._real
        total = weights.sum()
        result = {
            "frechet_distance": frechet_distance(weighted_statistics(sample.features, weights), real.statistics),
            "inception_score": inception_score(sample.posteriors, weights),
            "class_accuracy": float(weights @ self._right / total),
            "nearest_ratio": float(weights @ sample.nearest / total) / real.nearest,
        }
        spreads = []
        for own, distances in self._classes:
            counts = weights[own].astype(np.float64)
            pairs = counts.sum() ** 2 - (counts**2).sum()  # pairs of an image with itself are none
            if pairs > 0:
                spreads.append(counts @ distances @ counts / pairs)
        if spreads:
            result["diversity_ratio"] = float(np.mean(spreads)) / real.diversity
        return result


class DigitsMeasure:
    """Digits against the real ones that ship with the package."""

    features = "perceptron 64-100-32-10, 32 numbers of its last hidden layer"
    reference = "1,797 real digits"

    @staticmethod
    def suits(conditioner: Conditioner) -> bool:
        """Whether a model's pictures are digits: its classes are called so."""
        return isinstance(conditioner, ClassConditioner) and conditioner.class_names == DIGITS

    def tally(self, images: int) -> DigitTally:
        """An empty one."""
        return DigitTally(real_digits())


class DigitTally:
    """See :class:`estimates.Tally`."""

    def __init__(self, real: RealDigits) -> None:
        self._real = real
        self._parts: list[DigitSample] = []

    def add(self, images: NDArray[np.uint8], requests: Sequence[Request]) -> None:
        self._parts.append(self._real.sample(images, np.asarray(requests, dtype=np.int64)))

    def sample(self) -> DigitSample:
        """Everything added so far."""
        return DigitSample.joined(self._parts)

    def figures(self) -> dict[str, Estimate]:
        return digit_figures(self.sample(), self._real)

    def less(self, other: DigitTally) -> dict[str, Estimate]:
        return digit_differences(self.sample(), other.sample(), self._real)


def resampled(labels: NDArray[np.int64], resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """Counts [resamples, n] of a bootstrap within each class: how often each image is drawn.

    None where a class has a single image: drawn again and again, it would pass for certainty.
    """
    if len(labels) == 0 or np.bincount(labels)[np.unique(labels)].min() < 2:
        return np.zeros((0, len(labels)), dtype=np.int64)
    rng = np.random.default_rng(0)
    counts = np.zeros((resamples, len(labels)), dtype=np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        counts[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=resamples)
    return counts


def digit_figures(sample: DigitSample, real: RealDigits) -> dict[str, Estimate]:
    """Every metric with its 95 % interval over images; the real digits are taken as given.

    value +- 1.96 bootstrap standard errors, because a bootstrap sample, which repeats images, has a larger Frechet
    distance than the sample itself, so that its percentiles would miss the value; Wilson's interval for the accuracy.
    """
    measure = DigitMeasure(sample, real)
    figures = measure(np.ones(len(sample), dtype=np.int64))
    drawn = [measure(counts) for counts in resampled(sample.labels)]
    estimates = {
        name: normal_interval(value, [other[name] for other in drawn if name in other])
        for name, value in figures.items()
    }
    estimates["class_accuracy"] = wilson_interval(figures["class_accuracy"], len(sample))
    return estimates


def digit_differences(sample: DigitSample, base: DigitSample, real: RealDigits) -> dict[str, Estimate]:
    """``sample`` less ``base``, image by image: both were made from the same seeds and labels, in the same order.

    Raises:
        ValueError: the labels differ.
    """
    if not np.array_equal(sample.labels, base.labels):
        raise ValueError("paired samples need the same labels in the same order")
    measures = DigitMeasure(sample, real), DigitMeasure(base, real)
    counts = np.concatenate([np.ones((1, len(sample)), dtype=np.int64), resampled(sample.labels)])
    values = [tuple(measure(row) for measure in measures) for row in counts]
    return {
        name: normal_interval(
            values[0][0][name] - values[0][1][name],
            [ours[name] - theirs[name] for ours, theirs in values[1:] if name in ours and name in theirs],
        )
        for name in values[0][0]
    }
