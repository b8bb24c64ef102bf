"""Makes runtime/data/digits.npz: the real digits and the small classifier whose features `gtr-run evaluate` compares.

    python examples/digits/features.py --out runtime/data/digits.npz

A multi-layer perceptron (64 pixels, 100 and 32 hidden units, 10 classes), fitted in seconds on all real digits, which
are also the set that generated digits are compared with. What it is worth as a judge is measured with the same recipe
on three quarters of them.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from gtr_deploy.runtime.files import atomic_path


def fitted(pixels: np.ndarray, labels: np.ndarray, seed: int = 0) -> MLPClassifier:
    """The perceptron on pixels [n, 64] in [0, 1]."""
    return MLPClassifier((100, 32), max_iter=200, random_state=seed).fit(pixels, labels)


def held_out_accuracy(seed: int = 0) -> float:
    """Share of a quarter of the real digits that the recipe, fitted to the rest, gets right."""
    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, test_size=0.25, random_state=seed, stratify=digits.target)
    known, held_out, known_labels, held_out_labels = parts
    return float(fitted(known, known_labels, seed).score(held_out, held_out_labels))


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """What the file holds: images uint8 [1797, 8, 8] of 0..16, labels uint8, float32 weights and biases by layer."""
    digits = load_digits()
    classifier = fitted(digits.data / 16, digits.target, seed)
    result = {"images": digits.images.astype(np.uint8), "labels": digits.target.astype(np.uint8)}
    for layer, (weights, bias) in enumerate(zip(classifier.coefs_, classifier.intercepts_, strict=True)):
        result[f"weights{layer}"], result[f"bias{layer}"] = weights.astype(np.float32), bias.astype(np.float32)
    return result


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="npz file to write")
def main(out: Path) -> None:
    """Fits the classifier and writes it with the real digits."""
    with atomic_path(out) as temporary:
        np.savez_compressed(temporary, **arrays())
    accuracy = held_out_accuracy()
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB; the recipe gets {accuracy:.1%} of held-out real digits right")


if __name__ == "__main__":
    main()
