"""Guidance of a plan: its scale over the AR steps, and the steps that leave the null branch out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from golden import load_case, relative_error, torch_backend
from jobs import ARCHITECTURES, sample

from gtr_deploy.runtime.sampling.chains import Floats
from gtr_deploy.runtime.sampling.noise import SeededNoise
from gtr_deploy.runtime.sampling.plan import PlanSettings, SamplingPlan, preset, resolve

MAR_H = ARCHITECTURES["mar-h"]
TINY = load_case("mar_tiny_no_cfg").architecture
SMALL = PlanSettings("small", (3, 2, 2), generation_diffusion=(6, 4), reconstruction_diffusion=4, fts_diffusion=8)


def plan_of(name: str, **changes: Any) -> SamplingPlan:
    return resolve(replace(preset(name, MAR_H), **changes), MAR_H)


def test_guidance_of_gtr_grows_with_known_tokens() -> None:
    steps = plan_of("gtr", cfg=3.2).steps
    assert steps[0].guidance == pytest.approx(1 + 2.2 * 2 / 256)
    assert steps[23].guidance == pytest.approx(1 + 2.2 * 64 / 256)
    assert steps[29].guidance == pytest.approx(1 + 2.2 * 128 / 256)
    assert steps[31].guidance == pytest.approx(3.2)


def test_constant_guidance_and_none() -> None:
    assert {step.guidance for step in plan_of("gtr", cfg=3.2, cfg_schedule="constant").steps} == {3.2}
    for schedule in ("linear", "constant"):
        plain = plan_of("gtr", cfg=1.0, cfg_schedule=schedule)
        assert {(step.guidance, step.branches) for step in plain.steps} == {(1.0, 1)}
        assert plain.flops < 0.6 * plan_of("gtr", cfg=3.2, cfg_schedule=schedule).flops
    assert {step.branches for step in plan_of("gtr", cfg=0.5).steps} == {2}


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_guidance_interval(schedule: str) -> None:
    """A <= known before the step / all < B: what begins in the interval is guided as ever, the rest has one branch."""
    everywhere = plan_of("gtr", cfg=3.2, cfg_schedule=schedule)
    assert everywhere == plan_of("gtr", cfg=3.2, cfg_schedule=schedule, guidance_interval=(0, 1))
    plan = plan_of("gtr", cfg=3.2, cfg_schedule=schedule, guidance_interval=(0.25, 0.75))
    guided = [step.index for step in plan.steps if step.branches == 2]
    assert guided == list(range(24, 31))  # those that begin at 64 to 128 tokens of 256; step 31 begins at 192
    for step, full in zip(plan.steps, everywhere.steps, strict=True):
        if step.index in guided:
            assert step == full
        else:
            alone = plan_of("gtr", cfg=1.0).steps[step.index]
            assert step == alone
            assert (step.guidance, step.branches) == (1.0, 1)
            assert alone.flops < 0.6 * full.flops
    # Neighbouring intervals share no step and leave none out.
    below, above = (plan_of("gtr", cfg=3.2, guidance_interval=pair) for pair in ((0.0, 0.3), (0.3, 1.0)))
    assert [a.branches + b.branches for a, b in zip(below.steps, above.steps, strict=True)] == [3] * 32


def generated(plan: SamplingPlan) -> Floats:
    """Latents of one image with the torch reference on tiny recorded weights."""
    return sample(torch_backend("mar_tiny"), plan, TINY, [3], [5], SeededNoise([5], 16))


def test_steps_outside_the_interval_are_those_without_guidance() -> None:
    half = replace(SMALL, cfg=2.5, guidance_interval=(0.5, 1.0))
    late, full, plain = (generated(resolve(s, TINY)) for s in (half, replace(SMALL, cfg=2.5), replace(SMALL, cfg=1.0)))
    same = (late == plain).all(axis=2)[0]
    assert same.sum() == 32  # the first half of the tokens
    assert relative_error(late[:, ~same], plain[:, ~same]) > 1e-3
    assert relative_error(late, full) > 1e-3


def test_two_branches_at_scale_one_are_one() -> None:
    """Why a step whose scale is 1 may leave the null branch out."""
    one = resolve(replace(SMALL, cfg=1.0), TINY)
    two = SamplingPlan(one.settings, tuple(replace(step, branches=2) for step in one.steps))
    assert relative_error(generated(two), generated(one)) < 1e-5
