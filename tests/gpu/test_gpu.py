"""torch and ONNX Runtime on CUDA against the CPU. Each test is skipped, with its reason, where its part is missing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from golden import CASES, WEIGHT_SETS, load_case, load_weights, relative_error
from jobs import sample

from gtr_deploy.export.networks import DTYPES, build_networks
from gtr_deploy.export.reference.torch_backend import TorchBackend, open_backend
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.backends.protocol import Backend
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.machine.examine import Machine, examine_machine
from gtr_deploy.runtime.models.graphs import IMAGE_TOLERANCES
from gtr_deploy.runtime.pipeline import Generation, Pipeline
from gtr_deploy.runtime.sampling.chains import Floats

pytestmark = pytest.mark.gpu

PLANS = ("gtr-fast", "gtr")
LABELS, SEEDS = [3, 7, 1, 0, 9, 4, 8, 2], [5, 11, 2**63, 0, 7, 7, 123, 6]


@pytest.fixture(scope="module")
def cuda_machine() -> Machine:
    machine = examine_machine()
    if machine.gpu is None:
        pytest.skip(machine.gpu_problem)
    return machine


@pytest.fixture(scope="module")
def torch_cuda(cuda_machine: Machine) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} cannot use CUDA")


@pytest.fixture(scope="module")
def onnxruntime_cuda(cuda_machine: Machine) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no CUDA provider")


@pytest.fixture(scope="module")
def on_cpu(build_digits: Callable[[str], Path]) -> Callable[[str], Floats]:
    """Plan -> latents of LABELS and SEEDS, by torch on the CPU in fp32."""

    @cache
    def get(plan: str) -> Floats:
        bundle = Bundle.load(build_digits("fp32"))
        return _generate(bundle, open_backend(bundle, device="cpu"), plan).latents

    return get


def _generate(bundle: Bundle, backend: Backend, plan: str, which: slice = slice(None)) -> Generation:
    pipeline = Pipeline(bundle.architecture, bundle.conditioner, backend, dict(bundle.plan_defaults), bundle.max_batch)
    return pipeline.generate(LABELS[which], SEEDS[which], plan)


def _worst(found: Floats, wanted: Floats) -> float:
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


def _check_batches(bundle: Bundle, backend: Backend) -> None:
    """One seed, one image: batch 1 against batch 8. Kernels may differ with the batch, so half precision is looser."""
    together = _generate(bundle, backend, "gtr-fast").latents
    limit = IMAGE_TOLERANCES[bundle.precision]
    for index in (0, 2, 7):
        alone = _generate(bundle, backend, "gtr-fast", slice(index, index + 1)).latents
        assert relative_error(alone[0], together[index]) <= limit
        assert relative_error(alone[0], together[index - 1]) > limit


@pytest.mark.usefixtures("torch_cuda")
class TestTorch:
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("graphs", [False, True])
    @pytest.mark.parametrize("precision", list(DTYPES))
    def test_equals_the_cpu(
        self,
        build_digits: Callable[[str], Path],
        on_cpu: Callable[[str], Floats],
        precision: str,
        graphs: bool,
        plan: str,
    ) -> None:
        bundle = Bundle.load(build_digits(precision))
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a capture that fails falls back with one
            backend = open_backend(bundle, device="cuda", cuda_graphs=graphs)
            for _ in range(2):  # the second time after other contents of the same shapes
                found = _generate(bundle, backend, plan).latents
                assert _worst(found, on_cpu(plan)) <= IMAGE_TOLERANCES[precision]
                _generate(bundle, backend, plan, slice(None, None, -1))
        assert backend.description == f"torch cuda {precision}" + (", CUDA graphs" if graphs else "")

    def test_graphs_compute_what_eager_computes(self, build_digits: Callable[[str], Path]) -> None:
        bundle = Bundle.load(build_digits("fp16"))
        eager, captured = (open_backend(bundle, device="cuda", cuda_graphs=graphs) for graphs in (False, True))
        wanted = _generate(bundle, eager, "gtr-fast").latents
        assert _worst(_generate(bundle, captured, "gtr-fast").latents, wanted) <= 1e-3

    @pytest.mark.parametrize("graphs", [False, True])
    @pytest.mark.parametrize("name", CASES)
    def test_replays_the_original(self, name: str, graphs: bool) -> None:
        case = load_case(name)
        architecture = load_case(WEIGHT_SETS[case.weight_set]).architecture
        networks = build_networks(architecture, load_weights(case.weight_set), {})
        backend = TorchBackend(networks, "cuda", cuda_graphs=graphs)
        seeds = [0] * len(case.labels)
        latents = sample(backend, case.plan, case.architecture, case.labels, seeds, case.noise, case.orders)
        assert relative_error(latents, case.latents) <= IMAGE_TOLERANCES["fp32"]

    @pytest.mark.parametrize("graphs", [False, True])
    @pytest.mark.parametrize("precision", list(DTYPES))
    def test_one_seed_one_image(self, build_digits: Callable[[str], Path], precision: str, graphs: bool) -> None:
        bundle = Bundle.load(build_digits(precision))
        _check_batches(bundle, open_backend(bundle, device="cuda", cuda_graphs=graphs))


@pytest.mark.usefixtures("onnxruntime_cuda")
class TestOnnxRuntime:
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("graphs", [False, True])
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_equals_the_cpu_provider(
        self, build_digits: Callable[[str], Path], precision: str, graphs: bool, plan: str
    ) -> None:
        bundle = Bundle.load(build_digits(precision))
        paths = bundle.graph_paths()
        wanted = _generate(bundle, OnnxRuntimeBackend(paths), plan)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            backend = OnnxRuntimeBackend(paths, provider="cuda", cuda_graphs=graphs)
            for _ in range(2):
                found = _generate(bundle, backend, plan)
                assert _worst(found.latents, wanted.latents) <= IMAGE_TOLERANCES[precision]
                _generate(bundle, backend, plan, slice(None, None, -1))
        assert np.abs(found.images.astype(int) - wanted.images).mean() <= 1
        assert backend.description == "onnxruntime cuda" + (", CUDA graphs" if graphs else "")

    @pytest.mark.parametrize("graphs", [False, True])
    def test_bfloat16_equals_torch(
        self, build_digits: Callable[[str], Path], on_cpu: Callable[[str], Floats], graphs: bool
    ) -> None:
        bundle = Bundle.load(build_digits("bf16"))
        backend = OnnxRuntimeBackend(bundle.graph_paths(), provider="cuda", cuda_graphs=graphs)
        found = _generate(bundle, backend, "gtr-fast").latents
        assert _worst(found, on_cpu("gtr-fast")) <= IMAGE_TOLERANCES["bf16"]

    @pytest.mark.parametrize("graphs", [False, True])
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_one_seed_one_image(self, build_digits: Callable[[str], Path], precision: str, graphs: bool) -> None:
        bundle = Bundle.load(build_digits(precision))
        _check_batches(bundle, OnnxRuntimeBackend(bundle.graph_paths(), provider="cuda", cuda_graphs=graphs))

    def test_plain_calls_beside_captured_ones(self, build_digits: Callable[[str], Path]) -> None:
        """``run`` must not replay the diffusion step's graph, which reads other addresses."""
        bundle = Bundle.load(build_digits("fp32"))
        backend = OnnxRuntimeBackend(bundle.graph_paths(), provider="cuda")
        _generate(bundle, backend, "gtr-fast", slice(0, 1))
        rng = np.random.default_rng(0)
        width, channels = bundle.architecture.width, bundle.architecture.token_channels
        for rows in (1, 4, 4):
            inputs = {
                "x": rng.normal(size=(rows, channels)).astype(np.float32),
                "z": rng.normal(size=(2, rows, width)).astype(np.float32),
                "timestep": np.full(rows, 500),
                "coefficients": np.ones((rows, 7), np.float32),
                "guidance": np.ones(rows, np.float32),
                "noise": rng.normal(size=(rows, channels)).astype(np.float32),
            }
            (found,) = backend.run("diffusion_step", inputs)
            (wanted,) = OnnxRuntimeBackend(bundle.graph_paths()).run("diffusion_step", inputs)
            assert relative_error(found, wanted) <= 1e-5
