"""FTS scores against numpy.fft, and every selection rule on small examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import ARCHITECTURES
from msgspec import structs
from numpy.typing import NDArray

from gtr_deploy.export.graphs.detail_score import DetailScore
from gtr_deploy.runtime.errors import PlanError
from gtr_deploy.runtime.sampling.selection import FTS_RULES, detail_basis, refined_count, select

POSITIONS = np.array([[9, 4, 7, 1, 12]])
SCORE = np.array([[3.0, 5.0, 1.0, 4.0, 2.0]], dtype=np.float32)
NORM = np.array([[1.0, 2.0, 9.0, 3.0, 8.0]], dtype=np.float32)


def fft_score(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """s = sum_{n=1}^{floor(D/2)} |FFT(z)(n)| * (1 + n / floor(D/2)), along the last axis."""
    half = z.shape[-1] // 2
    n = np.arange(1, half + 1)
    return (np.abs(np.fft.fft(z, axis=-1)[..., 1 : half + 1]) * (1 + n / half)).sum(axis=-1)


@pytest.mark.parametrize("width", [2, 3, 7, 8, 64, 65, 96, 768, 1023, 1280])
def test_basis_gives_the_papers_score(width: int) -> None:
    z = np.random.default_rng(width).normal(size=(6, width))
    cosine, sine, weight = detail_basis(width)
    assert (cosine.dtype, sine.dtype, weight.dtype) == (np.float32, np.float32, np.float32)
    assert cosine.shape == sine.shape == (width, width // 2)
    assert weight.shape == (width // 2,)
    found = (np.sqrt((z @ cosine) ** 2 + (z @ sine) ** 2) * weight).sum(axis=-1)
    np.testing.assert_allclose(found, fft_score(z), rtol=1e-6)


@pytest.mark.parametrize("width", [7, 64, 96, 1280])
def test_detail_score_module(width: int) -> None:
    module = DetailScore(structs.replace(ARCHITECTURES["mar-digits"], width=width, heads=1))
    z = np.random.default_rng(1).normal(size=(2, 5, width)).astype(np.float32)
    z[:, :, 0] += 50.0  # an impulse: the same magnitude in every frequency
    score, norm = module(torch.from_numpy(z))
    np.testing.assert_allclose(score.numpy(), fft_score(z.astype(np.float64)), rtol=1e-5)
    np.testing.assert_allclose(norm.numpy(), np.sqrt((z.astype(np.float64) ** 2).sum(axis=-1)), rtol=1e-5)


def test_a_pure_tone_scores_by_its_frequency_and_a_constant_scores_nothing() -> None:
    width, channel = 64, np.arange(64)
    module = DetailScore(structs.replace(ARCHITECTURES["mar-digits"], width=width, heads=1))
    tones = np.stack([np.cos(2 * np.pi * n * channel / width) for n in (0, 1, 16, 31, 32)])
    score, norm = module(torch.from_numpy(tones[None].astype(np.float32)))
    # A cosine has magnitude D/2 at its frequency, D at the highest one; the weight runs from 1 to 2; n = 0 is left out.
    wanted = [0.0, 32 * (1 + 1 / 32), 32 * 1.5, 32 * (1 + 31 / 32), 64 * 2.0]
    np.testing.assert_allclose(score.numpy()[0], wanted, atol=1e-3)
    np.testing.assert_allclose(norm.numpy()[0], [8, 32**0.5, 32**0.5, 32**0.5, 8], rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "fraction", "predicted", "count"),
    [
        ("fts", 0.1, 64, 6),
        ("fts", 0.1, 128, 12),
        ("fts", 0.1, 30, 3),
        ("fts", 0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in floating point
        ("fts", 0.1, 9, 1),
        ("fts", 0.1, 1, 1),
        ("random", 0.0, 64, 1),
        ("lowest", 1.0, 64, 64),
        ("norm", 0.5, 5, 2),
        ("none", 0.5, 64, 0),
        ("all", 0.1, 64, 64),
    ],
)
def test_refined_count(rule: str, fraction: float, predicted: int, count: int) -> None:
    assert refined_count(rule, fraction, predicted) == count


@settings(deadline=None)
@given(hundredths=st.integers(0, 100), predicted=st.integers(1, 600))
def test_refined_count_is_the_floor_of_the_exact_product(hundredths: int, predicted: int) -> None:
    assert refined_count("fts", hundredths / 100, predicted) == max(1, hundredths * predicted // 100)


def test_unknown_rule() -> None:
    with pytest.raises(PlanError, match=r"^FTS rule 'best' is not one of fts, norm, random, lowest, none, all$"):
        refined_count("best", 0.1, 64)


@pytest.mark.parametrize(
    ("rule", "count", "chosen"),
    [
        ("fts", 2, [False, True, False, True, False]),
        ("fts", 1, [False, True, False, False, False]),
        ("lowest", 2, [False, False, True, False, True]),
        ("norm", 2, [False, False, True, False, True]),
        ("norm", 3, [False, False, True, True, True]),
        ("none", 0, [False] * 5),
        ("all", 5, [True] * 5),
        ("fts", 9, [True] * 5),
    ],
)
def test_rules(rule: str, count: int, chosen: list[bool]) -> None:
    found = select(rule, count, POSITIONS, [3], 16, SCORE, NORM)
    assert found.dtype == bool
    assert found.tolist() == [chosen]


@pytest.mark.parametrize("rule", ["fts", "lowest", "norm"])
def test_ties_go_to_the_smaller_position(rule: str) -> None:
    equal = np.ones((1, 5), dtype=np.float32)
    assert select(rule, 2, POSITIONS, [0], 16, equal, equal).tolist() == [[False, True, False, True, False]]
    # A tie only at the border: one place goes to the clear winner, the other to the smaller position.
    score = np.array([[2.0, 1.0, 1.0, 1.0, 1.0]], dtype=np.float32) * (-1 if rule == "lowest" else 1)
    assert select(rule, 2, POSITIONS, [0], 16, score, score).tolist() == [[True, False, False, True, False]]


@pytest.mark.parametrize("rule", ["fts", "lowest"])
def test_missing_scores(rule: str) -> None:
    with pytest.raises(PlanError, match=f"^FTS rule '{rule}' needs the detail score graph$"):
        select(rule, 2, POSITIONS, [0], 16, None, NORM)
    with pytest.raises(PlanError, match=r"^FTS rule 'norm' needs the detail score graph$"):
        select("norm", 2, POSITIONS, [0], 16, SCORE, None)


def test_images_are_chosen_separately() -> None:
    score = np.array([[1.0, 2.0, 3.0], [30.0, 20.0, 10.0]], dtype=np.float32)
    found = select("fts", 1, np.array([[0, 1, 2], [0, 1, 2]]), [0, 0], 16, score)
    assert found.tolist() == [[False, False, True], [True, False, False]]


def test_random_rule_depends_on_the_image_alone() -> None:
    seeds = list(range(40))
    positions = np.tile(np.arange(0, 64, 2), (40, 1))
    together = select("random", 3, positions, seeds, 64)
    assert (together.sum(axis=1) == 3).all()
    for image, seed in enumerate(seeds):
        alone = select("random", 3, positions[image : image + 1], [seed], 64)
        assert (alone[0] == together[image]).all()
        # The order in which the candidates stand does not matter either.
        turned = select("random", 3, positions[image : image + 1, ::-1], [seed], 64)
        assert (turned[0, ::-1] == together[image]).all()
    assert len({tuple(row) for row in together.tolist()}) > 35
    # Nearly every candidate is chosen in some image: 120 draws over 32 places miss one with probability 0.02.
    assert together.any(axis=0).sum() >= 30


def test_every_rule_marks_the_count() -> None:
    rng = np.random.default_rng(0)
    positions = np.stack([rng.permutation(64)[:20] for _ in range(3)])
    score, norm = rng.normal(size=(2, 3, 20)).astype(np.float32)
    for rule in FTS_RULES:
        count = refined_count(rule, 0.25, 20)
        assert select(rule, count, positions, [1, 2, 3], 64, score, norm).sum(axis=1).tolist() == [count] * 3
