"""Respacing tables against the DDPM formulas, recomputed here step by step in plain Python."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from golden import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_deploy.runtime.errors import PlanError
from gtr_deploy.runtime.models.graphs import COEFFICIENTS
from gtr_deploy.runtime.sampling.diffusion import cosine_betas, kept_timesteps, reverse_process


def training_alpha_bars() -> list[float]:
    """alpha_bar after each of the 1000 training steps, betas from cos^2((t+.008)/1.008*pi/2) capped at .999."""

    def curve(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    bars, product = [], 1.0
    for i in range(1000):
        product *= 1 - min(1 - curve((i + 1) / 1000) / curve(i / 1000), 0.999)
        bars.append(product)
    return bars


def test_kept_timesteps_of_the_baseline() -> None:
    kept = kept_timesteps(100)
    assert len(kept) == 100
    assert kept[:5] == [0, 10, 20, 30, 40]
    assert kept[-5:] == [959, 969, 979, 989, 999]


@pytest.mark.parametrize(
    ("case", "count", "limit"), [("digits_capped_950", 50, 950), ("digits_original_respacing", 100, 999)]
)
def test_kept_timesteps_are_the_recorded_ones(case: str, count: int, limit: int) -> None:
    assert kept_timesteps(count, limit) == json.loads((DATA / f"{case}.json").read_text())["kept_timesteps"]


def test_kept_timesteps_small_cases() -> None:
    assert kept_timesteps(1) == [999]
    assert kept_timesteps(1, 950) == [950]
    assert kept_timesteps(1, 0) == [0]
    assert kept_timesteps(2) == [0, 999]
    assert kept_timesteps(4, 9) == [0, 3, 6, 9]
    assert kept_timesteps(1000) == list(range(1000))


@settings(deadline=None, max_examples=300)
@given(data=st.data(), limit=st.integers(0, 999))
def test_kept_timesteps_rise_evenly(data: st.DataObject, limit: int) -> None:
    count = data.draw(st.integers(1, limit + 1))
    kept = kept_timesteps(count, limit)
    assert len(kept) == count
    assert kept[-1] == limit
    assert all(a < b for a, b in pairwise(kept))
    if count > 1:
        assert kept[0] == 0
        assert all(abs(t - i * limit / (count - 1)) <= 0.5 + 1e-6 for i, t in enumerate(kept))


@pytest.mark.parametrize(
    ("count", "limit", "message"),
    [
        (0, 999, "0 diffusion steps cannot be kept out of timesteps 0..999"),
        (-3, 999, "-3 diffusion steps cannot be kept out of timesteps 0..999"),
        (1001, 999, "1001 diffusion steps cannot be kept out of timesteps 0..999"),
        (52, 50, "52 diffusion steps cannot be kept out of timesteps 0..50"),
        (10, 1000, "max timestep 1000 is not in 0..999"),
        (10, -1, "max timestep -1 is not in 0..999"),
    ],
)
def test_ranges(count: int, limit: int, message: str) -> None:
    for function in (kept_timesteps, reverse_process):
        with pytest.raises(PlanError) as error:
            function(count, limit)
        assert str(error.value) == message


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_temperature_range(temperature: float) -> None:
    with pytest.raises(PlanError, match=r"^temperature .* is not a finite number >= 0$"):
        reverse_process(10, 999, temperature)


def test_cosine_betas() -> None:
    betas = cosine_betas()
    assert betas.shape == (1000,)
    assert betas[999] == 0.999
    assert betas[998] < 0.999
    assert (np.diff(betas) > 0).all()
    first = 1 - math.cos(0.009 / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert betas[0] == pytest.approx(first, rel=1e-12)
    assert np.cumprod(1 - betas)[999] == pytest.approx(2.4e-9, rel=0.03)
    np.testing.assert_allclose(np.cumprod(1 - betas), training_alpha_bars(), rtol=1e-9)


@pytest.mark.parametrize(
    ("count", "limit"), [(100, 999), (50, 999), (20, 999), (20, 950), (5, 950), (2, 9), (1000, 999)]
)
def test_table_columns(count: int, limit: int) -> None:
    process = reverse_process(count, limit)
    kept = kept_timesteps(count, limit)
    assert process.steps == count
    assert process.timesteps.dtype == np.int64
    assert process.timesteps.tolist() == kept[::-1]
    assert process.coefficients.dtype == np.float32
    assert process.coefficients.shape == (count, 7)
    bars = training_alpha_bars()
    for row, step in enumerate(range(count - 1, -1, -1)):
        bar, previous = bars[kept[step]], bars[kept[step - 1]] if step else 1.0
        beta = 1 - bar / previous
        # The first posterior variance is 0: the original puts the second one in its place.
        at = max(step, 1)
        at_bar, at_previous = bars[kept[at]], bars[kept[at - 1]]
        wanted = {
            "sqrt_recip_alpha_bar": math.sqrt(1 / bar),
            "sqrt_recipm1_alpha_bar": math.sqrt(1 / bar - 1),
            "posterior_mean_x0": math.sqrt(previous) * beta / (1 - bar),
            "posterior_mean_xt": math.sqrt(1 - beta) * (1 - previous) / (1 - bar),
            "posterior_log_variance": math.log((1 - at_bar / at_previous) * (1 - at_previous) / (1 - at_bar)),
            "log_beta": math.log(beta),
            "noise_scale": 1.0 if step else 0.0,
        }
        found = dict(zip(COEFFICIENTS, process.coefficients[row].tolist(), strict=True))
        assert found == pytest.approx(wanted, rel=2e-6, abs=1e-7), f"row {row}"


def test_first_step_multiplies_by_twenty_thousand() -> None:
    # 1/sqrt(alpha_bar(999)) = 20291; the posterior mean multiplies an error of eps by 316 at 100 steps, 630, 1670.
    for count, factor in ((100, 316), (50, 630), (20, 1670)):
        recip, recipm1, mean_x0 = reverse_process(count).coefficients[0, :3].tolist()
        assert recip == pytest.approx(20291, rel=1e-3)
        assert recipm1 * mean_x0 == pytest.approx(factor, rel=0.02)


def test_single_step_returns_the_predicted_x0() -> None:
    for limit in (999, 950, 0):
        process = reverse_process(1, limit)
        row = dict(zip(COEFFICIENTS, process.coefficients[0].tolist(), strict=True))
        assert process.timesteps.tolist() == [limit]
        assert row["posterior_mean_x0"] == 1.0
        assert row["posterior_mean_xt"] == 0.0
        assert row["noise_scale"] == 0.0
        assert np.isfinite(process.coefficients).all()
        assert row["sqrt_recip_alpha_bar"] == pytest.approx(training_alpha_bars()[limit] ** -0.5, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.9, 1, 1.7])
def test_temperature_scales_the_noise_and_nothing_else(temperature: float) -> None:
    plain, scaled = reverse_process(20).coefficients, reverse_process(20, 999, temperature).coefficients
    assert (scaled[:, :6] == plain[:, :6]).all()
    np.testing.assert_allclose(scaled[:, 6], [temperature] * 19 + [0.0], rtol=1e-7)


def test_tables_cannot_be_changed() -> None:
    process = reverse_process(10)
    with pytest.raises(ValueError, match=r"read-only"):
        process.coefficients[0, 0] = 1.0
    with pytest.raises(ValueError, match=r"read-only"):
        process.timesteps[0] = 1


@settings(deadline=None, max_examples=60)
@given(data=st.data(), limit=st.integers(0, 999))
def test_tables_are_finite_and_end_at_the_data(data: st.DataObject, limit: int) -> None:
    count = data.draw(st.integers(1, min(limit + 1, 120)))
    process = reverse_process(count, limit)
    assert np.isfinite(process.coefficients).all()
    assert (np.diff(process.timesteps) < 0).all()
    last = dict(zip(COEFFICIENTS, process.coefficients[-1].tolist(), strict=True))
    assert (last["posterior_mean_x0"], last["posterior_mean_xt"]) == (pytest.approx(1.0, rel=1e-6), 0.0)
