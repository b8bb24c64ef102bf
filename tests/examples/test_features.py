"""The classifier that ships is what its script makes, and the two judges of digits agree."""

from __future__ import annotations

from pathlib import Path

import features
import judge
import numpy as np
from commands import runner

from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.quality.digits import DATA, RealDigits, real_digits


def test_the_script_makes_the_file_that_ships(tmp_path: Path) -> None:
    result = runner().invoke(features.main, ["--out", str(tmp_path / "digits.npz")])
    assert result.exit_code == 0, result.output
    assert "of held-out real digits right" in result.output
    with np.load(tmp_path / "digits.npz") as made, np.load(DATA) as shipped:
        assert set(made.files) == set(shipped.files)
        for name in made.files:
            assert made[name].dtype == shipped[name].dtype
            assert made[name].shape == shipped[name].shape
        for name in ("images", "labels"):
            np.testing.assert_array_equal(made[name], shipped[name])
    assert DATA.stat().st_size < 100_000
    # The weights may differ in their last bits from one BLAS to another; what they say may not.
    images = np.repeat(
        real_digits().pixels.reshape(-1, 8, 8).repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=-1
    )
    images = np.round(images * 255).astype(np.uint8)
    ours = RealDigits.read(tmp_path / "digits.npz").sample(images, real_digits().labels).posteriors
    theirs = real_digits().sample(images, real_digits().labels).posteriors
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.995


def test_two_judges_agree_about_generated_digits(digits_pipeline: Pipeline) -> None:
    labels = np.arange(30) % 10
    images = digits_pipeline.generate(labels.tolist(), plan="gtr-compact", batch_size=30).images
    perceptron = real_digits().sample(images, labels).posteriors.argmax(axis=1) == labels
    assert abs(perceptron.mean() - judge.train_judge().accuracy(images, labels)) < 0.2
    assert 0.3 < perceptron.mean() < 0.95
