"""Features of digits for the Frechet distance: the last hidden layer of a small classifier of real digits.

A multi-layer perceptron (64 pixels, 100 and 32 hidden units) trained in seconds on all real digits, which are also the
set that generated digits are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from judge import small_images
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from gtr_deploy.calibration.frechet import FeatureStatistics, feature_statistics, frechet_distance


@dataclass(frozen=True)
class FeatureSpace:
    """Attributes:
    classifier: the fitted perceptron.
    real: statistics of all real digits' features.
    """

    classifier: MLPClassifier
    real: FeatureStatistics

    def distance(self, images: NDArray[np.uint8]) -> float:
        """Frechet distance of images uint8 [n, 32, 32, 3] to the real digits; n of at least some hundred."""
        return frechet_distance(feature_statistics([_hidden(self.classifier, small_images(images))]), self.real)


def train_features(seed: int = 0) -> FeatureSpace:
    """Fits the perceptron on all real digits; takes about three seconds."""
    digits = load_digits()
    pixels = digits.data / 16
    classifier = MLPClassifier((100, 32), max_iter=200, random_state=seed).fit(pixels, digits.target)
    return FeatureSpace(classifier, feature_statistics([_hidden(classifier, pixels)]))


def _hidden(classifier: MLPClassifier, pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 64] -> [n, 32]: all layers but the last, ReLU between them."""
    values = pixels
    for weights, bias in zip(classifier.coefs_[:-1], classifier.intercepts_[:-1], strict=True):
        values = np.maximum(values @ weights + bias, 0)
    return values
