"""Shapes of plans, the profiles that cover them, and where a generation's arrays lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import ARCHITECTURES, PLAN_DEFAULTS, class_labels
from msgspec import structs

from gtr_deploy.runtime.backends.blocks import ALIGNMENT
from gtr_deploy.runtime.backends.tensorrt.device_layout import device_layout, ordered_to_grid
from gtr_deploy.runtime.models.architecture import Decoder
from gtr_deploy.runtime.sampling.chains import chain_shape
from gtr_deploy.runtime.sampling.job import generation_job
from gtr_deploy.runtime.sampling.noise import SeededNoise
from gtr_deploy.runtime.sampling.orders import generation_orders
from gtr_deploy.runtime.sampling.plan import PRESETS, SamplingPlan, preset, resolve
from gtr_deploy.runtime.sampling.shapes import call_shapes, covering, described, profiles

MODELS = ("mar-h", "mar-digits")


def plan_of(model: str, name: str, **changes) -> SamplingPlan:
    architecture = ARCHITECTURES[model]
    return resolve(replace(preset(name, architecture, PLAN_DEFAULTS[model]), **changes), architecture)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_profiles_cover_every_shape_of_every_preset_and_batch(model: str, max_batch: int) -> None:
    plans = [plan_of(model, name) for name in PRESETS]
    found = profiles(plans, max_batch)
    for plan in plans:
        for batch in range(1, max_batch + 1):
            for kind, shapes in call_shapes(plan, batch).items():
                for sizes in shapes:
                    assert covering(found[kind], sizes) is not None, (plan.settings.name, kind, sizes)


@pytest.mark.parametrize("interval", [(0.0, 0.3), (0.3, 1.0), (0.3, 0.6)])
def test_profiles_cover_one_branch_and_two(interval: tuple[float, float]) -> None:
    plan = plan_of("mar-h", "gtr", guidance_interval=interval)
    assert {step.branches for step in plan.steps} == {1, 2}
    found = profiles([plan], 8)
    for batch in (1, 3, 8):
        for kind, shapes in call_shapes(plan, batch).items():
            for sizes in shapes:
                assert covering(found[kind], sizes) is not None, (kind, sizes)
    wanted = {sizes["G"] for sizes in call_shapes(plan, 1)["backbone"]}
    assert wanted == {1, 2}
    assert len(found["backbone"]) <= 4


@pytest.mark.parametrize("model", MODELS)
def test_profiles_are_few_and_tight(model: str) -> None:
    found = profiles([plan_of(model, "gtr")], 8)
    assert max(len(ranges) for ranges in found.values()) <= 4
    architecture = ARCHITECTURES[model]
    for profile in found["backbone"]:
        assert profile["V"][2] < architecture.tokens
        for low, best, high in profile.values():
            assert max(low, min(1, high)) <= best <= high
    # A single image has a profile of its own, and the largest batch is the best size of another.
    batches = {profile["B"] for profile in found["backbone"]}
    assert batches == {(1, 1, 1), (2, 8, 8)}
    # mar predicts a token or two at a time; that must not stretch the reconstruction's profile.
    both = profiles([plan_of(model, "gtr"), plan_of(model, "mar")], 8)
    last = plan_of(model, "gtr").steps[-1].predicted
    assert any(profile["P"][0] == last for profile in both["backbone"])


def test_the_nearest_profile_is_chosen() -> None:
    wide, tight = {"N": (1, 100, 200)}, {"N": (1, 8, 64)}
    assert covering([wide, tight], {"N": 6}) == 1
    assert covering([wide, tight], {"N": 64}) == 0
    assert covering([wide, tight], {"N": 201}) is None
    assert described({"B": (1, 1, 1), "N": (2, 8, 64)}) == "B=1 N=2..64 (8)"


def test_chains_divide_as_the_sampler_s_segments() -> None:
    step = plan_of("mar-h", "gtr").steps[-1]
    assert (step.predicted, step.refined, step.refined_diffusion_steps, step.diffusion_steps) == (64, 6, 50, 20)
    split = chain_shape(step)
    assert (split.longer, split.alone, split.common, split.refined_longer) == (6, 30, 20, True)
    split = chain_shape(replace(step, refined_diffusion_steps=5))
    assert (split.longer, split.alone, split.common, split.refined_longer) == (58, 15, 5, False)
    for changes in ({"refined": 0}, {"refined": 64}, {"refined_diffusion_steps": 20}):
        assert chain_shape(replace(step, **changes)).longer == 0


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(PRESETS)),
    batch=st.integers(1, 5),
    rule=st.sampled_from(["fts", "random", "none", "all", "lowest"]),
    extra=st.sampled_from([5, 20, 50]),
)
def test_blocks_are_aligned_and_apart(name: str, batch: int, rule: str, extra: int) -> None:
    plan = plan_of("mar-digits", name, fts=rule, fts_diffusion=extra)
    layout = device_layout(plan, ARCHITECTURES["mar-digits"], batch)
    areas = {
        "inputs": [*layout.conditioning.values(), *(b for s in layout.steps for b in s.inputs.values())],
        "tables": [b for s in layout.steps for b in s.tables.values()],
        "work": list(layout.work.values()),
    }
    sizes = {"inputs": layout.inputs_size, "tables": layout.tables_size, "work": layout.work_size}
    for area, blocks in areas.items():
        end = 0
        for block in sorted(blocks, key=lambda block: block.offset):
            assert block.offset % ALIGNMENT == 0
            assert block.stride is None or block.stride % ALIGNMENT == 0
            assert block.offset >= end
            end = block.offset + max(block.bytes, 1)
        assert end <= sizes[area]


def test_what_the_host_fills_in_is_what_the_sampler_draws() -> None:
    architecture = ARCHITECTURES["mar-digits"]
    plan = plan_of("mar-digits", "gtr-fast")
    seeds = [4, 9]
    orders = generation_orders("gtr", architecture.grid, 3, "odd", seeds)
    layout = device_layout(plan, architecture, 2)
    area = np.zeros(layout.inputs_size, dtype=np.uint8)
    noise = SeededNoise(seeds, architecture.token_channels)
    labels = class_labels([3, 7], 10)
    layout.fill_inputs(area, generation_job(plan, architecture, labels, seeds, noise, orders))
    assert np.array_equal(layout.conditioning["labels"].view(area), labels["labels"])
    for step in layout.steps:
        known, made = step.step.known, step.step.predicted
        predict = step.inputs["predict"].view(area)
        assert np.array_equal(predict, orders[:, known : known + made])
        images = np.repeat([0, 1], made)
        steps = max(step.step.diffusion_steps, step.step.refined_diffusion_steps)
        drawn = noise.draw(images, predict.ravel(), steps)
        assert np.array_equal(step.inputs["x"].view(area), drawn[:, 0])
        if step.split.longer:
            assert np.array_equal(step.inputs["noise_alone"].view(area)[0], drawn[:, 1])
            assert np.array_equal(step.inputs["noise_long"].view(area)[-1], drawn[:, steps])
            assert np.array_equal(step.inputs["noise_short"].view(area)[0], drawn[:, 1])
        else:
            assert np.array_equal(step.inputs["noise"].view(area), drawn[:, 1:].transpose(1, 0, 2))


def test_latents_go_back_to_the_grid() -> None:
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(6) for _ in range(2)])
    grid = rng.standard_normal((2, 6, 3)).astype(np.float32)
    made = np.take_along_axis(grid, orders[:, :, None], axis=1)
    assert np.array_equal(ordered_to_grid(made, orders), grid)


def test_rows_of_nine_channels_on_an_odd_grid_are_aligned_too() -> None:
    odd = structs.replace(
        ARCHITECTURES["mar-digits"],
        grid=(3, 5),
        buffer=0,
        token_channels=9,
        decoder=Decoder(kind="patches", stride=1, patch=3),
    )
    plan = resolve(preset("gtr-fast", odd, {"max_timestep": 950}), odd)
    layout = device_layout(plan, odd, 3)
    padded = [block for step in layout.steps for block in step.inputs.values() if block.stride is not None]
    assert padded
    assert all(block.stride % ALIGNMENT == 0 for block in padded)  # type: ignore[operator]
    area, seeds = np.zeros(layout.inputs_size, dtype=np.uint8), [1, 2, 3]
    noise = SeededNoise(seeds, 9)
    job = generation_job(plan, odd, class_labels([1, 2, 3], 10), seeds, noise)
    layout.fill_inputs(area, job)
    first = layout.steps[0]
    positions = job.orders[:, : first.step.predicted]
    drawn = noise.draw(np.repeat([0, 1, 2], first.step.predicted), positions.ravel(), first.step.diffusion_steps)
    assert np.array_equal(first.inputs["x"].view(area), drawn[:, 0])
    assert np.array_equal(first.inputs["noise"].view(area), drawn[:, 1:].transpose(1, 0, 2))
