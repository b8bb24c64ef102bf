"""The sampling loop with the torch reference on tiny recorded weights: one seed, one image; chains; what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from golden import load_case, relative_error, torch_backend
from jobs import class_labels, sample
from numpy.typing import NDArray

from gtr_deploy.export.reference.torch_backend import TorchBackend
from gtr_deploy.runtime.backends.host_loop import HostLoopBackend
from gtr_deploy.runtime.errors import BackendError, UsageError
from gtr_deploy.runtime.models.architecture import Architecture
from gtr_deploy.runtime.models.conditioning import Arrays
from gtr_deploy.runtime.sampling.chains import DiffusionChain, Floats, Integers, diffusion_chain
from gtr_deploy.runtime.sampling.diffusion import kept_timesteps, reverse_process
from gtr_deploy.runtime.sampling.job import StepResult
from gtr_deploy.runtime.sampling.loop import BackboneOutput
from gtr_deploy.runtime.sampling.noise import SeededNoise
from gtr_deploy.runtime.sampling.plan import ARStep, FittedSettings, PlanSettings, resolve

SMALL = FittedSettings(
    "small",
    (3, 2, 2),
    generation_diffusion=(6, 4),
    reconstruction_diffusion=4,
    fts_diffusion=8,
    max_timestep=950,
    cfg=2.5,
)
PLANS = {
    "gtr": SMALL,
    "gtr-compact": replace(SMALL, context="compact"),
    "interval": replace(SMALL, guidance_interval=(0.1, 0.5)),
    "halton": replace(SMALL, order="halton", stage_steps=(3, 2), fts="random"),
    "random-norm": replace(SMALL, order="random", fts="norm", cfg=1.0),
    "raster-lowest": replace(SMALL, order="raster", fts="lowest", cfg_schedule="constant", parity="even"),
}
SEEDS = [0, 1, 7, 2**64 - 1, 99, 12345, 2**40, 3]
LABELS = [0, 1, 9, 3, 3, 5, 2, 8]


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return torch_backend("mar_tiny")


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return load_case("mar_tiny_no_cfg").architecture


def generate(
    backend: TorchBackend, architecture: Architecture, settings: PlanSettings, labels: list[int], seeds: list[int]
) -> Floats:
    noise = SeededNoise(seeds, architecture.token_channels)
    return sample(backend, resolve(settings, architecture), architecture, labels, seeds, noise)


class NumberedNoise:
    """Noise whose values say where they belong: 10000 * image + 100 * position + row, the same in both channels."""

    def draw(self, images: NDArray[np.int64], positions: NDArray[np.int64], steps: int) -> NDArray[np.float32]:
        values = 10000 * images[:, None] + 100 * positions[:, None] + np.arange(1 + steps)
        return np.repeat(values[:, :, None], 2, axis=2).astype(np.float32)


class RecordingBackend(HostLoopBackend):
    """The torch reference, keeping what it was asked; optionally spoils the result of one AR step."""

    name = "recording"

    def __init__(self, inner: TorchBackend, bad_step: int = -1, bad_value: float = math.nan) -> None:
        self.inner, self.bad_step, self.bad_value = inner, bad_step, bad_value
        self.conditions: list[tuple[Floats, Integers, Integers, Integers, Integers]] = []
        self.chains: list[DiffusionChain] = []
        self.detail_calls = 0

    def run_graph(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        return self.inner.run_graph(kind, inputs)

    def backbone(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, conditioning: Arrays
    ) -> BackboneOutput:
        self.conditions.append((tokens.copy(), visible, predict, context, conditioning["labels"]))
        return self.inner.backbone(tokens, visible, predict, context, conditioning)

    def detail(self, z: BackboneOutput) -> tuple[Floats, Floats]:
        self.detail_calls += 1
        return self.inner.detail(z)

    def denoise(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        self.chains.append(chain)
        result = self.inner.denoise(z, chain)
        if len(self.chains) - 1 == self.bad_step:
            result[-1, -1] = self.bad_value
        return result


def reconstruction_step(predicted: int, plain: int, refined: int, refined_steps: int, guidance: float = 2.0) -> ARStep:
    return ARStep(30, 2, 0, predicted, 0, plain, refined, refined_steps, guidance, 2, 0, 0)


# One seed, one image.


@pytest.mark.parametrize("name", PLANS)
def test_an_image_does_not_depend_on_its_batch(backend: TorchBackend, architecture: Architecture, name: str) -> None:
    together = generate(backend, architecture, PLANS[name], LABELS, SEEDS)
    assert together.shape == (8, 64, 16)
    assert together.dtype == np.float32
    for image in range(8):
        alone = generate(backend, architecture, PLANS[name], LABELS[image : image + 1], SEEDS[image : image + 1])
        assert relative_error(together[image], alone[0]) <= 1e-5
    turned = generate(backend, architecture, PLANS[name], LABELS[::-1], SEEDS[::-1])
    assert relative_error(turned[::-1], together) <= 1e-5
    some = [5, 2, 2, 6]
    mixed = generate(backend, architecture, PLANS[name], [LABELS[i] for i in some], [SEEDS[i] for i in some])
    assert relative_error(mixed, together[some]) <= 1e-5


def test_seed_label_and_plan_matter(backend: TorchBackend, architecture: Architecture) -> None:
    base = generate(backend, architecture, SMALL, [3], [5])
    assert (generate(backend, architecture, SMALL, [3], [5]) == base).all()
    others = [
        generate(backend, architecture, SMALL, [4], [5]),
        generate(backend, architecture, SMALL, [3], [6]),
        generate(backend, architecture, PLANS["gtr-compact"], [3], [5]),
        generate(backend, architecture, replace(SMALL, fts="none"), [3], [5]),
        generate(backend, architecture, replace(SMALL, cfg=1.0), [3], [5]),
        generate(backend, architecture, replace(SMALL, temperature=0.5), [3], [5]),
        generate(backend, architecture, replace(SMALL, max_timestep=900), [3], [5]),
    ]
    assert min(relative_error(other, base) for other in others) > 1e-3


# What the backend is asked.


@pytest.mark.parametrize("name", PLANS)
def test_backend_calls_follow_the_plan(backend: TorchBackend, architecture: Architecture, name: str) -> None:
    settings = PLANS[name]
    plan = resolve(settings, architecture)
    recording = RecordingBackend(backend)
    labels, seeds = [4, 9, 1], [8, 9, 10]
    latents = sample(recording, plan, architecture, labels, seeds, SeededNoise(seeds, 16))
    made = np.empty((3, 0), dtype=np.int64)
    for step, (tokens, visible, predict, context, branch_labels) in zip(plan.steps, recording.conditions, strict=True):
        assert (visible == made).all()
        assert predict.shape == (3, step.predicted)
        assert context.shape == (3, step.context)
        assert branch_labels.tolist() == [labels, [10, 10, 10]][: step.branches]
        assert (tokens == np.take_along_axis(latents, visible[:, :, None], axis=1)).all()
        for row in np.concatenate([visible, predict, context], axis=1).tolist():
            assert len(set(row)) == len(row)
        made = np.concatenate([made, predict], axis=1)
    assert (np.sort(made, axis=1) == np.arange(64)).all()
    for step, chain in zip(plan.steps, recording.chains, strict=True):
        assert sorted(chain.rows.tolist()) == list(range(3 * step.predicted))
        np.testing.assert_allclose(chain.guidance, step.guidance, rtol=1e-6)
        assert sum(len(segment.timesteps) for segment in chain.segments) == step.head_calls
    if settings.order == "gtr":
        for row in made[:, -32:]:
            assert all((p // 8 + p % 8) % 2 == 1 for p in row.tolist())
    refining = sum(step.refined > 0 for step in plan.steps)
    assert recording.detail_calls == (0 if settings.fts == "random" else refining)


def test_compact_context_hides_later_stages(backend: TorchBackend, architecture: Architecture) -> None:
    recording = RecordingBackend(backend)
    sample(recording, resolve(PLANS["gtr-compact"], architecture), architecture, [1], [2], SeededNoise([2], 16))
    for index, (_, visible, predict, context, _) in enumerate(recording.conditions):
        diagonals = np.concatenate([visible, predict, context], axis=1)[0]
        diagonals = diagonals // 8 + diagonals % 8
        if index < 3:
            assert (diagonals % 4 == 0).all()
        elif index < 5:
            assert (diagonals % 2 == 0).all()
        assert len(diagonals) == [16, 16, 16, 32, 32, 64, 64][index]


@pytest.mark.parametrize(("rule", "share"), [("none", 0.0), ("all", 1.0)])
def test_rules_none_and_all_ask_for_no_score(
    backend: TorchBackend, architecture: Architecture, rule: str, share: float
) -> None:
    recording, seen = RecordingBackend(backend), []
    plan = resolve(replace(SMALL, fts=rule), architecture)
    sample(recording, plan, architecture, [1, 2], [3, 4], SeededNoise([3, 4], 16), observer=seen.append)
    assert recording.detail_calls == 0
    assert [result.refined.mean() for result in seen] == [0.0] * 5 + [share] * 2
    assert [len(c.segments) for c in recording.chains] == [1] * 7
    assert [len(c.segments[0].timesteps) for c in recording.chains[-2:]] == [8 if rule == "all" else 4] * 2


def test_fts_refines_the_highest_scores(backend: TorchBackend, architecture: Architecture) -> None:
    seen: list[StepResult] = []
    conditions: list[NDArray[np.float64]] = []

    class Keeping(RecordingBackend):
        def backbone(
            self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, conditioning: Arrays
        ) -> BackboneOutput:
            result = super().backbone(tokens, visible, predict, context, conditioning)
            conditions.append(np.asarray(result.value[0], dtype=np.float64))
            return result

    plan = resolve(replace(SMALL, fts_fraction=0.25), architecture)
    sample(Keeping(backend), plan, architecture, [1, 2], [3, 4], SeededNoise([3, 4], 16), observer=seen.append)
    n = np.arange(1, 33)
    for result, z in list(zip(seen, conditions, strict=True))[-2:]:
        score = (np.abs(np.fft.fft(z)[..., 1:33]) * (1 + n / 32)).sum(axis=-1)
        assert result.refined.sum(axis=1).tolist() == [4, 4]
        for marks, scores in zip(result.refined, score, strict=True):
            assert scores[marks].min() > scores[~marks].max()


# The observer.


def test_observer_sees_every_step(backend: TorchBackend, architecture: Architecture) -> None:
    plan = resolve(SMALL, architecture)
    seen: list[tuple[StepResult, Floats]] = []
    latents = sample(
        backend,
        plan,
        architecture,
        [1, 2],
        [3, 4],
        SeededNoise([3, 4], 16),
        observer=lambda result: seen.append((result, result.latents.copy())),
    )
    assert [result.step for result, _ in seen] == list(plan.steps)
    made = np.zeros((2, 64), dtype=bool)
    for result, so_far in seen:
        assert result.refined.shape == result.predicted.shape == (2, result.step.predicted)
        assert result.refined.sum(axis=1).tolist() == [result.step.refined] * 2
        assert not np.take_along_axis(made, result.predicted, axis=1).any()
        np.put_along_axis(made, result.predicted, True, axis=1)
        assert (so_far[made] == latents[made]).all()
        assert (so_far[~made] == 0).all()
        assert (so_far[made] != 0).any(axis=1).all()
    assert made.all()


# Given orders.


def test_given_orders_are_followed(backend: TorchBackend, architecture: Architecture) -> None:
    orders = np.stack([np.random.default_rng(i).permutation(64) for i in range(2)])
    seen: list[StepResult] = []
    plan, noise = resolve(SMALL, architecture), SeededNoise([3, 4], 16)
    sample(backend, plan, architecture, [1, 2], [3, 4], noise, orders, seen.append)
    assert (np.concatenate([result.predicted for result in seen], axis=1) == orders).all()


@pytest.mark.parametrize(
    "orders",
    [
        np.arange(64)[None],
        np.tile(np.arange(63), (2, 1)),
        np.tile(np.arange(64).reshape(8, 8), (2, 1)),
        np.zeros((2, 64), dtype=np.int64),
        np.tile(np.arange(1, 65), (2, 1)),
        np.stack([np.arange(64), np.minimum(np.arange(64), 62)]),
    ],
    ids=["one row", "short", "grid", "zeros", "from one", "repeat"],
)
def test_bad_orders(backend: TorchBackend, architecture: Architecture, orders: Integers) -> None:
    plan = resolve(SMALL, architecture)
    with pytest.raises(UsageError) as error:
        sample(backend, plan, architecture, [1, 2], [3, 4], SeededNoise([3, 4], 16), orders)
    assert str(error.value) == "orders must be [2, 64], each row a permutation of 0..63"


# Values that are not finite.


@pytest.mark.parametrize(("bad_step", "value"), [(0, math.nan), (4, math.inf), (6, -math.inf)])
def test_values_that_are_not_finite(
    backend: TorchBackend, architecture: Architecture, bad_step: int, value: float
) -> None:
    seen: list[StepResult] = []
    spoiled = RecordingBackend(backend, bad_step, value)
    plan = resolve(SMALL, architecture)
    with pytest.raises(BackendError) as error:
        sample(spoiled, plan, architecture, [1, 2], [3, 4], SeededNoise([3, 4], 16), observer=seen.append)
    assert str(error.value).startswith(
        f"AR step {bad_step + 1} of 7 gave values that are not finite on backend recording; run gtr-export verify"
    )
    assert len(seen) == bad_step


# Chains of reverse steps.


def test_refined_and_plain_tokens_end_together() -> None:
    predict = np.array([[5, 9, 3, 12], [40, 41, 42, 43]])
    refined = np.array([[False, True, False, False], [False, False, False, True]])
    settings = replace(SMALL, max_timestep=999, temperature=0.9)
    chain = diffusion_chain(reconstruction_step(4, 20, 1, 50), settings, predict, refined, NumberedNoise())
    assert chain.rows.tolist() == [1, 7, 0, 2, 3, 4, 5, 6]
    assert [segment.rows for segment in chain.segments] == [2, 8]
    assert [len(segment.timesteps) for segment in chain.segments] == [30, 20]
    first, second = chain.segments
    long, short = reverse_process(50, 999, 0.9), reverse_process(20, 999, 0.9)
    fifty, twenty = kept_timesteps(50)[::-1], kept_timesteps(20)[::-1]
    for row in (0, 1):
        assert first.timesteps[:, row].tolist() + second.timesteps[:, row].tolist() == fifty
        assert (np.concatenate([first.coefficients[:, row], second.coefficients[:, row]]) == long.coefficients).all()
    for row in range(2, 8):
        assert second.timesteps[:, row].tolist() == twenty
        assert (second.coefficients[:, row] == short.coefficients).all()
    names = [10000 * (r // 4) + 100 * int(predict.ravel()[r]) for r in chain.rows.tolist()]
    assert chain.x[:, 0].tolist() == names
    for row, name in enumerate(names[:2]):
        assert [*first.noise[:, row, 0], *second.noise[:, row, 0]] == [name + 1 + k for k in range(50)]
    for row, name in list(enumerate(names))[2:]:
        assert second.noise[:, row, 1].tolist() == [name + 1 + k for k in range(20)]
    for segment in chain.segments:
        n, length = segment.rows, len(segment.timesteps)
        assert segment.timesteps.shape == (length, n)
        assert segment.coefficients.shape == (length, n, 7)
        assert segment.noise.shape == (length, n, 2)
        assert (segment.timesteps.dtype, segment.coefficients.dtype, segment.noise.dtype) == (
            np.int64,
            np.float32,
            np.float32,
        )
    # All end at t = 0, without noise.
    assert (second.timesteps[-1] == 0).all()
    assert (second.coefficients[-1, :, 6] == 0).all()
    assert chain.guidance.tolist() == [2.0] * 8


def test_fewer_steps_for_refined_tokens_than_for_plain_ones() -> None:
    predict, refined = np.array([[5, 9, 3]]), np.array([[False, True, False]])
    chain = diffusion_chain(reconstruction_step(3, 20, 1, 7), SMALL, predict, refined, NumberedNoise())
    assert chain.rows.tolist() == [0, 2, 1]
    assert [(s.rows, len(s.timesteps)) for s in chain.segments] == [(2, 13), (3, 7)]
    assert chain.segments[1].timesteps[:, 2].tolist() == kept_timesteps(7, 950)[::-1]
    assert chain.segments[0].timesteps[:, 0].tolist() == kept_timesteps(20, 950)[::-1][:13]
    assert chain.segments[1].noise[:, 2, 0].tolist() == [900 + 1 + k for k in range(7)]
    assert chain.segments[1].noise[:, 0, 0].tolist() == [500 + 14 + k for k in range(7)]


def test_equal_step_counts_make_one_segment() -> None:
    predict, refined = np.array([[5, 9, 3]]), np.array([[False, True, False]])
    chain = diffusion_chain(reconstruction_step(3, 20, 1, 20), SMALL, predict, refined, NumberedNoise())
    assert [(s.rows, len(s.timesteps)) for s in chain.segments] == [(3, 20)]
    assert sorted(chain.rows.tolist()) == [0, 1, 2]
    assert chain.x[:, 0].tolist() == [100 * int(predict[0, r]) for r in chain.rows]
    assert [chain.segments[0].noise[0, i, 0] for i in range(3)] == [100 * int(predict[0, r]) + 1 for r in chain.rows]


@pytest.mark.parametrize(("everything", "steps"), [(False, 20), (True, 50)])
def test_nothing_or_everything_refined(everything: bool, steps: int) -> None:
    predict = np.array([[5, 9, 3], [1, 2, 3]])
    refined = np.full((2, 3), everything)
    step = reconstruction_step(3, 20, 3 if everything else 0, 50 if everything else 0)
    chain = diffusion_chain(step, SMALL, predict, refined, NumberedNoise())
    assert [(s.rows, len(s.timesteps)) for s in chain.segments] == [(6, steps)]
    assert chain.rows.tolist() == list(range(6))
    assert chain.segments[0].timesteps[:, 5].tolist() == kept_timesteps(steps, 950)[::-1]


def test_a_refined_token_equals_the_same_token_run_alone(backend: TorchBackend, architecture: Architecture) -> None:
    """Running 8-step and 4-step tokens in one chain changes neither."""
    positions = np.arange(64)[None]
    none = positions[:, :0]
    z = backend.backbone(np.zeros((1, 0, 16), np.float32), none, positions, none, class_labels([3], 10))
    refined = (np.arange(64) % 5 == 0)[None]
    noise = SeededNoise([4], 16)

    def run(marks: NDArray[np.bool_]) -> Floats:
        step = reconstruction_step(64, 4, int(marks.sum()), 8)
        chain = diffusion_chain(step, SMALL, positions, marks, noise)
        result = np.empty((64, 16), dtype=np.float32)
        result[chain.rows] = backend.denoise(z, chain)
        return result

    mixed, plain, extra = run(refined), run(np.zeros_like(refined)), run(np.ones_like(refined))
    marks = refined[0]
    assert relative_error(mixed[~marks], plain[~marks]) <= 1e-5
    assert relative_error(mixed[marks], extra[marks]) <= 1e-5
    assert relative_error(plain[marks], extra[marks]) > 1e-2
