"""Generation through a real bundle on ONNX Runtime."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import ARCHITECTURES
from recorded import RecordedNoise

from gtr_deploy.runtime import BackendError, Pipeline, PlanError, PlanSettings, UsageError
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.sampling.noise import SeededNoise
from gtr_deploy.runtime.sampling.orders import generation_orders

DIGITS = ARCHITECTURES["mar-digits"]
SHORT = PlanSettings("short", (2, 1, 1), generation_diffusion=(3, 3), reconstruction_diffusion=3, fts_diffusion=4)


@pytest.mark.parametrize("plan", ["gtr", "gtr-compact", "halton"])
def test_one_seed_one_image(digits_pipeline: Pipeline, plan: str) -> None:
    labels, seeds = [3, 7, 1, 0, 9, 4, 8, 2], [5, 11, 2**63, 0, 7, 7, 123, 6]
    together = digits_pipeline.generate(labels, seeds, plan, batch_size=8)
    for index in (0, 2, 7):
        alone = digits_pipeline.generate([labels[index]], [seeds[index]], plan)
        difference = np.linalg.norm(alone.latents[0] - together.latents[index])
        assert difference <= 1e-5 * np.linalg.norm(alone.latents[0])
    mixed = digits_pipeline.generate(labels[::-1], seeds[::-1], plan, batch_size=3)
    for one, other in zip(mixed.latents[::-1], together.latents, strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)


def test_seeds_and_classes_matter(digits_pipeline: Pipeline) -> None:
    result = digits_pipeline.generate([3, 3, 4], [1, 2, 1], "gtr-fast")
    assert not np.array_equal(result.images[0], result.images[1])
    assert not np.array_equal(result.images[0], result.images[2])
    assert result.images.shape == (3, 32, 32, 3)
    assert result.images.dtype == np.uint8
    assert result.requests == (3, 3, 4)
    assert result.seeds == (1, 2, 1)


def test_default_seeds_count_up_across_batches(digits_pipeline: Pipeline) -> None:
    result = digits_pipeline.generate([1, 2, 3], plan="gtr-fast", batch_size=2)
    assert result.seeds == (0, 1, 2)
    alone = digits_pipeline.generate([3], [2], "gtr-fast")
    np.testing.assert_allclose(alone.latents[0], result.latents[2], atol=1e-4)


def test_guidance_changes_the_picture_and_scale_one_is_one_branch(digits_pipeline: Pipeline) -> None:
    plain = PlanSettings("own", (4, 2), max_timestep=950, cfg=1.0)
    guided = PlanSettings("own", (4, 2), max_timestep=950, cfg=3.0)
    first = digits_pipeline.generate([5], [0], plain)
    second = digits_pipeline.generate([5], [0], guided)
    assert {step.branches for step in first.plan.steps} == {1}
    assert {step.branches for step in second.plan.steps} == {2}
    assert np.linalg.norm(first.latents - second.latents) > 0.01


def test_observer_sees_every_batch(digits_pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []

    def observer(first: int) -> Any:
        return lambda result: seen.append((first, result.step.index))

    plan = digits_pipeline.plan("gtr-fast")
    digits_pipeline.generate([1, 2, 3], plan=plan, batch_size=2, observer=observer)
    steps = len(plan.steps)
    assert seen == [(first, step) for first in (0, 2) for step in range(steps)]


def test_orders_and_noise_can_be_given(digits_pipeline: Pipeline) -> None:
    plan = digits_pipeline.plan("gtr-fast")
    orders = generation_orders("gtr", DIGITS.grid, 3, "odd", [4, 5])
    seeded = digits_pipeline.generate([1, 2], [4, 5], plan)
    given = digits_pipeline.generate([1, 2], [4, 5], plan, noise=SeededNoise([4, 5], 16), orders=orders)
    assert np.array_equal(seeded.latents, given.latents)
    one_by_one = digits_pipeline.generate([1, 2], [4, 5], plan, orders=orders, batch_size=1)
    np.testing.assert_allclose(one_by_one.latents, seeded.latents, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"requests": []}, "nothing to generate"),
        ({"requests": [10]}, r"class 10 is not in 0\.\.9"),
        ({"requests": [-1]}, r"class -1 is not in 0\.\.9"),
        ({"requests": [True]}, "is not a whole number"),
        ({"requests": ["3"]}, "is not a whole number"),
        ({"requests": [1.0]}, "is not a whole number"),
        ({"requests": [1], "seeds": [1, 2]}, "2 seeds for 1 images"),
        ({"requests": [1], "seeds": [-1]}, "seed -1 is not an integer"),
        ({"requests": [1], "batch_size": 0}, "batch size 0"),
        ({"requests": [1], "batch_size": 1.5}, r"batch size 1\.5"),
        ({"requests": [1], "plan": "best"}, "plan 'best' is not one of"),
        ({"requests": [1], "plan": PlanSettings("own", (65,))}, r"AR steps must be in 1\.\.64"),
        ({"requests": [1], "orders": np.zeros((1, 64), dtype=np.int64)}, "permutation"),
        ({"requests": [1], "orders": np.zeros((2, 64), dtype=np.int64)}, "2 orders for 1 images"),
        (
            {
                "requests": [1, 2],
                "batch_size": 1,
                "noise": RecordedNoise(np.zeros((2, 64, 16), np.float32), np.zeros((2, 64, 50, 16), np.float32)),
            },
            "needs all 2 images in one batch",
        ),
    ],
)
def test_bad_requests_are_one_line(digits_pipeline: Pipeline, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        digits_pipeline.generate(**arguments)
    assert "\n" not in str(caught.value)


def test_plan_by_name_settings_or_itself(digits_pipeline: Pipeline) -> None:
    plan = digits_pipeline.plan("gtr")
    assert digits_pipeline.plan(plan) is plan
    assert digits_pipeline.plan(plan.settings) == plan
    assert plan.settings.max_timestep == 950
    with pytest.raises(PlanError):
        digits_pipeline.plan("none")


def test_unknown_backend(digits_bundle: Path) -> None:
    with pytest.raises(BackendError, match="'tensorflow' is not one of auto, onnxruntime, openvino, tensorrt, "):
        Pipeline.load(digits_bundle, backend="tensorflow")


def test_bfloat16_is_refused_before_anything_is_opened(build_digits: Callable[[str], Path]) -> None:
    with pytest.raises(BackendError, match="no bfloat16 matrix product; use an fp32 or fp16 bundle"):
        Pipeline.load(build_digits("bf16"), "onnxruntime")


def test_half_precision_makes_nearly_the_same_picture(
    build_digits: Callable[[str], Path], digits_pipeline: Pipeline
) -> None:
    half = Pipeline.load(build_digits("fp16"), threads=1).generate([3, 8], plan="gtr-fast")
    full = digits_pipeline.generate([3, 8], plan="gtr-fast")
    error = np.linalg.norm(half.latents - full.latents) / np.linalg.norm(full.latents)
    assert 0 < error < 2e-2


class TestOnnxRuntimeBackend:
    def test_a_graph_that_is_no_graph(self, tmp_path: Path) -> None:
        (tmp_path / "x.onnx").write_bytes(b"not a graph")
        with pytest.raises(BackendError, match=r"cannot load .*x\.onnx") as caught:
            OnnxRuntimeBackend({"backbone": tmp_path / "x.onnx"})
        assert "\n" not in str(caught.value)

    def test_idle_threads_do_not_spin(self, digits_bundle: Path) -> None:
        """Each graph has a thread pool: one that spins takes the cores from the others."""
        paths = {
            kind: digits_bundle / "graphs" / f"{kind}.onnx" for kind in ("backbone", "modulation", "diffusion_step")
        }
        for session in OnnxRuntimeBackend(paths)._sessions.values():
            options = session.get_session_options()
            assert options.get_session_config_entry("session.force_spinning_stop") == "1"

    def test_missing_graph_and_wrong_input(self, digits_bundle: Path) -> None:
        backend = OnnxRuntimeBackend({"decoder": digits_bundle / "graphs" / "decoder.onnx"}, threads=1)
        with pytest.raises(BackendError, match="no backbone graph"):
            backend.run("backbone", {})
        with pytest.raises(BackendError, match="failed in the decoder graph") as caught:
            backend.run("decoder", {"latents": np.zeros((1, 3, 16), np.float32)})
        assert "\n" not in str(caught.value)

    def test_without_onnx_runtime(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(BackendError, match="pip install"):
            OnnxRuntimeBackend({})


def test_a_stream_takes_what_it_needs_and_keeps_nothing(digits_pipeline: Pipeline) -> None:
    taken: list[int] = []
    alive: list[weakref.ref[Any]] = []

    def endless() -> Iterator[int]:
        for index in itertools.count():
            taken.append(index)
            yield index % 10

    made = []
    for batch in digits_pipeline.stream(endless(), itertools.count(7), SHORT, batch_size=2):
        gc.collect()
        assert sum(latents() is not None for latents in alive) <= 1
        alive.append(weakref.ref(batch.latents))
        made.append((batch.images.copy(), batch.requests, batch.seeds))
        if len(made) == 3:
            break
    assert taken == list(range(6))
    assert [(requests, seeds) for _, requests, seeds in made] == [
        ((0, 1), (7, 8)),
        ((2, 3), (9, 10)),
        ((4, 5), (11, 12)),
    ]
    whole = digits_pipeline.generate(range(6), range(7, 13), SHORT, batch_size=2)
    assert np.array_equal(np.concatenate([images for images, *_ in made]), whole.images)


def test_the_last_batch_of_a_stream_is_smaller_and_seeds_count_up(digits_pipeline: Pipeline) -> None:
    seen: list[int] = []
    batches = list(digits_pipeline.stream([1, 2, 3], plan=SHORT, batch_size=2, observer=seen.append))
    assert [batch.seeds for batch in batches] == [(0, 1), (2,)]
    assert seen == [0, 2]
    assert list(digits_pipeline.stream([], plan=SHORT)) == []


def test_wrong_streams(digits_pipeline: Pipeline) -> None:
    with pytest.raises(PlanError, match="best"):  # at once, not when the first batch is asked for
        digits_pipeline.stream([1], plan="best")
    with pytest.raises(UsageError, match="batch size 0"):
        digits_pipeline.stream([1], plan=SHORT, batch_size=0)
    for requests, seeds, words in (([1, 10], None, "class 10"), ([1, 2], [1], "1 seeds"), ([1], [-1], "seed -1")):
        with pytest.raises(UsageError, match=words):
            next(digits_pipeline.stream(requests, seeds, SHORT))
