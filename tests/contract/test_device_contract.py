"""What a backend that keeps whole generations on a device must do, on the stand-in and on a real GPU alike.

The stand-in executes the graphs behind a fake CUDA and a fake TensorRT, and checks addresses, order and leaks. What
only it can see (call order, addresses) is in tests/runtime/test_tensorrt_backend.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.bundles import add_fake_engines, fake_host
from golden import relative_error

from gtr_deploy.export.engines.builder import EngineRequest, build_engines
from gtr_deploy.runtime.backends.tensorrt.backend import TensorRTBackend, open_tensorrt
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import GtrError
from gtr_deploy.runtime.machine.examine import examine_machine, library_version
from gtr_deploy.runtime.models.graphs import IMAGE_TOLERANCES
from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.sampling.job import StepResult
from gtr_deploy.runtime.sampling.plan import PlanSettings, preset

REQUESTS, SEEDS = [3, 7, 1], [5, 2**63, 0]
PLANS = ("gtr", "gtr-fast")

Opener = Callable[..., Pipeline]


@pytest.fixture(
    params=[
        pytest.param(("stand-in", "tensorrt"), id="stand-in-tensorrt"),
        pytest.param(("stand-in", "tensorrt-rtx"), id="stand-in-tensorrt-rtx"),
        pytest.param(("gpu", "tensorrt"), id="gpu-tensorrt", marks=pytest.mark.gpu),
        pytest.param(("gpu", "tensorrt-rtx"), id="gpu-tensorrt-rtx", marks=pytest.mark.gpu),
    ]
)
def opened(request: pytest.FixtureRequest, own_bundle: Path, digits_pipeline: Pipeline) -> Iterator[Opener]:
    """Opens a bundle with engines of one flavour, (plans, cuda_graph) to a pipeline; all are closed at the end."""
    where, flavour = request.param
    made: list[TensorRTBackend] = []
    if where == "stand-in":
        machine = request.getfixturevalue("fake_gpu")
        host = fake_host(machine)
    else:
        host = examine_machine()
        if host.gpu is None:
            pytest.skip(host.gpu_problem)
        if library_version(flavour) is None:
            pytest.skip(f"{flavour} is not installed")

    def get(plans: tuple[Any, ...] = PLANS, cuda_graph: str = "auto") -> Pipeline:
        if where == "stand-in":
            bundle = add_fake_engines(own_bundle, flavour, plans=plans)
        else:
            bundle = _with_real_engines(own_bundle, flavour, plans)
        made.append(open_tensorrt(bundle, flavour, cuda_graph=cuda_graph, machine=host))
        like = digits_pipeline
        return Pipeline(like.architecture, like.conditioner, made[-1], like.plan_defaults, like.max_batch)

    yield get
    for backend in made:
        backend.close()
    if where == "stand-in":
        assert machine.leaks() == []


def _with_real_engines(folder: Path, flavour: str, plans: tuple[Any, ...]) -> Bundle:
    import json

    names = []
    for index, plan in enumerate(plans):
        if not isinstance(plan, str):
            file = folder.parent / f"plan-{index}.json"
            file.write_text(json.dumps({"plan": plan.settings.to_json()}), encoding="utf-8")
            plan = str(file)
        names.append(plan)
    try:
        build_engines(EngineRequest(folder, flavour, plans=tuple(names), max_batch=4), Reporter(quiet=True))
    except GtrError as error:
        if "compute capability" not in str(error):
            raise
        pytest.skip(str(error))
    return Bundle.load(folder)


def _agrees(found: np.ndarray, wanted: np.ndarray) -> None:
    assert max(relative_error(a, b) for a, b in zip(found, wanted, strict=True)) <= IMAGE_TOLERANCES["fp32"]


@pytest.mark.parametrize("cuda_graph", ["off", "step", "generation"])
def test_generations_equal_the_host_loop(opened: Opener, digits_pipeline: Pipeline, cuda_graph: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a capture that fails falls back with one
        pipeline = opened(("gtr-fast",), cuda_graph)
        wanted = digits_pipeline.generate(REQUESTS, SEEDS, "gtr-fast")
        for _ in range(3):  # eagerly, captured, replayed
            found = pipeline.generate(REQUESTS, SEEDS, "gtr-fast")
            _agrees(found.latents, wanted.latents)
        assert np.abs(found.images.astype(int) - wanted.images).max() <= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"fts": "norm"},
        {"fts": "lowest"},
        {"fts": "random"},
        {"fts": "none"},
        {"fts": "all"},
        {"fts_fraction": 0.5, "fts_diffusion": 7, "reconstruction_diffusion": 11},  # the others have the longer chain
        {"fts_diffusion": 11, "reconstruction_diffusion": 11},  # equally long
        {"cfg": 1.0},
        {"guidance_interval": (0.2, 0.6)},  # one branch, two, one: the last stage, which selects, has one
        {"guidance_interval": (0.5, 1.0), "stage_steps": (12, 3, 2)},
        {"context": "compact", "parity": "even"},
    ],
    ids=str,
)
def test_every_selection_rule_and_chain(opened: Opener, digits_pipeline: Pipeline, changes: dict[str, Any]) -> None:
    fast: PlanSettings = preset("gtr-fast", digits_pipeline.architecture, digits_pipeline.plan_defaults)
    plan = digits_pipeline.plan(replace(fast, **changes))
    pipeline = opened((plan,))
    wanted = digits_pipeline.generate(REQUESTS, SEEDS, plan)
    for _ in range(2):
        _agrees(pipeline.generate(REQUESTS, SEEDS, plan).latents, wanted.latents)


@pytest.mark.parametrize("cuda_graph", ["step", "generation"])
def test_a_replay_is_bit_for_bit_what_runs_eagerly(opened: Opener, cuda_graph: str) -> None:
    """One context is enqueued many times with other addresses within one capture."""
    eager, replayed = opened(("gtr-fast",), "off"), opened(("gtr-fast",), cuda_graph)
    replayed.warm_up("gtr-fast", len(REQUESTS))
    wanted = eager.generate(REQUESTS, SEEDS, "gtr-fast").latents
    for _ in range(2):
        np.testing.assert_array_equal(replayed.generate(REQUESTS, SEEDS, "gtr-fast").latents, wanted)


def test_one_seed_one_image(opened: Opener) -> None:
    pipeline = opened()
    together = pipeline.generate(REQUESTS, SEEDS, "gtr").latents
    for index in (0, 2):
        part = slice(index, index + 1)
        _agrees(pipeline.generate(REQUESTS[part], SEEDS[part], "gtr").latents, together[part])


def test_an_observer_sees_what_the_host_loop_shows(opened: Opener, digits_pipeline: Pipeline) -> None:
    seen: dict[str, list[StepResult]] = {"device": [], "host": []}

    def recorder(name: str) -> Callable[[int], Any]:
        return lambda _: lambda result: seen[name].append(replace(result, latents=result.latents.copy()))

    pipeline = opened()
    pipeline.generate([8, 9, 2], [1, 2, 3], "gtr-fast")  # leaves latents behind
    for _ in range(2):
        seen["device"].clear()
        pipeline.generate(REQUESTS, SEEDS, "gtr-fast", observer=recorder("device"))
    digits_pipeline.generate(REQUESTS, SEEDS, "gtr-fast", observer=recorder("host"))
    assert len(seen["device"]) == len(seen["host"]) > 3
    for mine, theirs in zip(seen["device"], seen["host"], strict=True):
        assert mine.step == theirs.step
        assert np.array_equal(mine.predicted, theirs.predicted)
        assert np.array_equal(mine.refined, theirs.refined)
        _agrees(mine.latents, theirs.latents)
    assert any(result.refined.any() for result in seen["device"])


def test_a_hook_sees_the_parts_and_changes_nothing(opened: Opener) -> None:
    pipeline = opened(("gtr-fast",))
    wanted = pipeline.generate(REQUESTS, SEEDS, "gtr-fast")
    seconds: dict[str, float] = {}
    pipeline.backend.hook = lambda call: seconds.update({call.kind: seconds.get(call.kind, 0.0) + call.seconds})
    shown: list[StepResult] = []
    found = pipeline.generate(REQUESTS, SEEDS, "gtr-fast", observer=lambda _: shown.append)
    assert len(shown) == len(found.plan.steps)
    assert set(seconds) == {"backbone", "diffusion_step", "decoder"}
    assert all(value > 0 for value in seconds.values())
    _agrees(found.latents, wanted.latents)


def test_single_graphs_equal_the_host(opened: Opener, digits_pipeline: Pipeline) -> None:
    z = np.random.default_rng(0).standard_normal((2, 16, 128)).astype(np.float32)
    found = opened().backend.run("detail_score", {"z": z})
    for mine, theirs in zip(found, digits_pipeline.backend.run("detail_score", {"z": z}), strict=True):
        assert relative_error(mine, theirs) <= 1e-4


def test_warming_up_changes_no_picture(opened: Opener, digits_pipeline: Pipeline) -> None:
    pipeline = opened()
    pipeline.warm_up("gtr", len(REQUESTS))
    _agrees(pipeline.generate(REQUESTS, SEEDS).latents, digits_pipeline.generate(REQUESTS, SEEDS).latents)
