"""TensorRT and TensorRT-RTX engines, built and run on this machine's GPU, against ONNX Runtime on the CPU."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from golden import relative_error

from gtr_deploy.export.engines.builder import EngineRequest, build_engines
from gtr_deploy.runtime.backends.tensorrt.backend import TensorRTBackend, open_tensorrt
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.commands.doctor import diagnose
from gtr_deploy.runtime.errors import GtrError
from gtr_deploy.runtime.machine.examine import examine_machine, library_version
from gtr_deploy.runtime.models.graphs import IMAGE_TOLERANCES
from gtr_deploy.runtime.pipeline import Pipeline

pytestmark = pytest.mark.gpu

LABELS, SEEDS = [3, 7, 1, 0], [5, 11, 2**63, 0]


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def flavour(request: pytest.FixtureRequest) -> str:
    machine = examine_machine()
    if machine.gpu is None:
        pytest.skip(machine.gpu_problem)
    if library_version(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture(scope="module")
def engines(
    flavour: str, build_digits: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """Precision -> a bundle with engines for this GPU; skips where the library does not know the GPU."""
    made: dict[str, Bundle] = {}

    def get(precision: str) -> Bundle:
        if precision not in made:
            folder = tmp_path_factory.mktemp(f"{flavour}-{precision}") / "bundle"
            shutil.copytree(build_digits(precision), folder)
            try:
                build_engines(EngineRequest(folder, flavour, plans=("gtr", "gtr-fast"), max_batch=4), Reporter(True))
            except GtrError as error:
                if "compute capability" not in str(error):
                    raise
                pytest.skip(str(error))
            made[precision] = Bundle.load(folder)
        return made[precision]

    return get


@pytest.fixture
def opened(engines: Callable[[str], Bundle], flavour: str) -> Iterator[Callable[..., Pipeline]]:
    made: list[TensorRTBackend] = []

    def get(precision: str, cuda_graph: str) -> Pipeline:
        bundle = engines(precision)
        made.append(open_tensorrt(bundle, flavour, cuda_graph=cuda_graph))
        return Pipeline(bundle.architecture, bundle.conditioner, made[-1], dict(bundle.plan_defaults), bundle.max_batch)

    yield get
    for backend in made:
        backend.close()


@pytest.mark.parametrize("cuda_graph", ["off", "step", "generation"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_generations_equal_onnx_runtime(
    opened: Callable[..., Pipeline], digits_pipeline: Pipeline, precision: str, cuda_graph: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a capture that fails falls back with one
        pipeline = opened(precision, cuda_graph)
        for plan in ("gtr", "gtr-fast"):
            wanted = digits_pipeline.generate(LABELS, SEEDS, plan).latents
            for _ in range(3):  # eagerly, captured, replayed
                found = pipeline.generate(LABELS, SEEDS, plan).latents
                worst = max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))
                assert worst <= IMAGE_TOLERANCES[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_replay_is_bit_for_bit_what_runs_eagerly(opened: Callable[..., Pipeline], precision: str) -> None:
    eager, replayed = opened(precision, "off"), opened(precision, "generation")
    replayed.warm_up("gtr-fast", len(LABELS))
    wanted = eager.generate(LABELS, SEEDS, "gtr-fast").latents
    for _ in range(2):
        np.testing.assert_array_equal(replayed.generate(LABELS, SEEDS, "gtr-fast").latents, wanted)


def test_one_seed_one_image(opened: Callable[..., Pipeline]) -> None:
    """In half precision; tests/contract has the same in float32."""
    pipeline = opened("fp16", "auto")
    together = pipeline.generate(LABELS, SEEDS, "gtr-fast").latents
    for index in (0, 3):
        alone = pipeline.generate(LABELS[index : index + 1], SEEDS[index : index + 1], "gtr-fast").latents
        assert relative_error(alone[0], together[index]) <= IMAGE_TOLERANCES["fp16"]


def test_the_doctor_says_that_it_runs(engines: Callable[[str], Bundle], flavour: str) -> None:
    findings = diagnose(examine_machine(), engines("fp16"))
    assert [f.status for f in findings if f.subject == f"backend {flavour}"] == ["ok"]
