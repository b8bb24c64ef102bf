"""FID and Inception score added up batch by batch, and reference files of every wrong kind. No network here."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gtr_deploy.runtime.errors import GtrError, UsageError
from gtr_deploy.runtime.quality import inception as quality_inception
from gtr_deploy.runtime.quality.estimates import inception_score
from gtr_deploy.runtime.quality.frechet import feature_statistics, frechet_distance
from gtr_deploy.runtime.quality.inception import InceptionMeasure, InceptionTally, open_inception, read_reference


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> int:
    """Features of 12 numbers instead of 2048, whose square roots take long."""
    monkeypatch.setattr(quality_inception, "FEATURES", 12)
    return 12


def _write(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def _reference(path: Path, width: int) -> Path:
    rows = np.random.default_rng(1).standard_normal((100, width))
    return _write(path, mu=rows.mean(axis=0), sigma=np.cov(rows, rowvar=False), mu_s=np.zeros(3))


def test_sums_are_the_whole(narrow: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    features, posteriors = rng.standard_normal((205, narrow)), rng.dirichlet(np.full(8, 0.2), 205)

    def extract(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = images[:, 0, 0, 0].astype(int)
        return features[index].astype(np.float32), posteriors[index]

    monkeypatch.setattr(quality_inception, "open_inception", lambda weights, device: extract)
    measure = InceptionMeasure(_reference(tmp_path / "r.npz", narrow))
    tally = measure.tally(205)
    for part in np.array_split(np.arange(205), 9):
        tally.add(np.tile(part[:, None, None, None].astype(np.uint8), (1, 2, 2, 3)), part)
    figures = tally.figures()
    wanted = frechet_distance(feature_statistics([features]), read_reference(tmp_path / "r.npz"))
    assert figures["frechet_distance"].value == pytest.approx(wanted, rel=1e-5)
    assert figures["frechet_distance"].low is None
    scores = [inception_score(posteriors[np.arange(205) * 10 // 205 == split]) for split in range(10)]
    assert figures["inception_score"].value == pytest.approx(np.mean(scores))
    reach = 1.96 * np.std(scores, ddof=1) / np.sqrt(10)
    assert figures["inception_score"].high == pytest.approx(np.mean(scores) + reach)
    assert tally.less(tally) == {}


def test_missing_pictures_are_noticed(narrow: int, tmp_path: Path) -> None:
    statistics = read_reference(_reference(tmp_path / "r.npz", narrow))
    tally = InceptionTally(statistics, lambda images: (np.eye(12)[: len(images)], np.eye(3)[: len(images)]), 4)
    tally.add(np.zeros((3, 1, 1, 3), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(UsageError, match="3 of 4"):
        tally.figures()


def test_references_of_every_wrong_kind(narrow: int, tmp_path: Path) -> None:
    mu, sigma = np.zeros(narrow), np.eye(narrow)
    bad = sigma.copy()
    bad[3, 4] = np.nan
    tilted = sigma.copy()
    tilted[0, 5] = 0.5
    text = tmp_path / "text.npz"
    text.write_text("mu sigma")
    whole = _reference(tmp_path / "whole.npz", narrow).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    pickled = io.BytesIO()
    np.lib.format.write_array(pickled, np.array([print] * 2, dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "pickle.npz", "w") as archive:
        archive.writestr("mu.npy", pickled.getvalue())
        archive.writestr("sigma.npy", b"")
    for path, words in (
        (text, "is not an npz file"),
        (tmp_path / "cut.npz", "is not an npz file"),
        (tmp_path / "pickle.npz", "cannot be read"),
        (_write(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8)), r"no mu; pictures \(arr_0\)"),
        (_write(tmp_path / "half.npz", mu=mu), "has mu and no sigma"),
        (_write(tmp_path / "small.npz", mu=mu[:5], sigma=sigma), r"mu is float64 \[5\], not float \[12\]"),
        (_write(tmp_path / "whole_numbers.npz", mu=mu.astype(int), sigma=sigma), "mu is int64"),
        (_write(tmp_path / "nan.npz", mu=mu, sigma=bad), "sigma has values that are not finite"),
        (_write(tmp_path / "tilted.npz", mu=mu, sigma=tilted), "not a covariance"),
        (_write(tmp_path / "flat.npz", mu=mu, sigma=0 * sigma), "not a covariance"),
        (_write(tmp_path / "huge.npz", mu=np.zeros(100_000), sigma=sigma), "mu is larger than"),
    ):
        with pytest.raises(GtrError, match=words) as caught:
            read_reference(path)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_inception, "entry_points", lambda **_: ())
    with pytest.raises(GtrError, match=r"pip install 'gtr-deploy\[evaluate\]'"):
        open_inception(None, None)

    class Broken:
        def load(self) -> None:
            raise ImportError("No module named 'torch'")

    monkeypatch.setattr(quality_inception, "entry_points", lambda **_: (Broken(),))
    with pytest.raises(GtrError, match="No module named 'torch'"):
        open_inception(None, None)
