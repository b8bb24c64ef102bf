"""A classifier trained on real digits only, which judges generated ones.

A support vector machine on 8x8 images (scikit-learn's own example for this data), independent of the perceptron that
`gtr-run evaluate` counts with: another kind of classifier, and a quarter of the real digits kept back to measure it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from gtr_deploy.runtime.quality.digits import small_images


@dataclass(frozen=True)
class Judge:
    """Attributes:
    classifier: the fitted machine.
    held_out_accuracy: share of real test digits (a quarter of the data, never seen in training) that it gets right.
    """

    classifier: SVC
    held_out_accuracy: float

    def accuracy(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
        """Share of images uint8 [n, 32, 32, 3] that are taken for the class they were asked to be."""
        return float(np.mean(self.classifier.predict(small_images(images)) == labels))


def train_judge(seed: int = 0) -> Judge:
    """Fits on three quarters of the real digits and measures on the rest; takes about a second."""
    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, test_size=0.25, random_state=seed, stratify=digits.target)
    known, held_out, known_labels, held_out_labels = parts
    classifier = SVC(gamma="scale", C=10.0).fit(known, known_labels)
    return Judge(classifier, float(classifier.score(held_out, held_out_labels)))
