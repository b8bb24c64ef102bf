"""Generations recorded from the original MAR code, replayed with the torch reference and with exported ONNX graphs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from golden import CASES, WEIGHT_SETS, GoldenCase, load_case, load_weights, relative_error, torch_backend
from jobs import class_labels, sample

from gtr_deploy.export.graphs.onnx_export import export_graph
from gtr_deploy.export.networks import build_graph_module
from gtr_deploy.runtime.backends.host_loop import HostLoopBackend
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.models.conditioning import Arrays
from gtr_deploy.runtime.models.families import graph_specs
from gtr_deploy.runtime.models.graphs import NETWORKS, ROW_GRAPHS, TensorSpec
from gtr_deploy.runtime.sampling.chains import DiffusionChain, Floats, Integers
from gtr_deploy.runtime.sampling.job import generation_job
from gtr_deploy.runtime.sampling.loop import BackboneOutput, generate_on_host
from gtr_deploy.runtime.sampling.noise import SeededNoise
from gtr_deploy.runtime.sampling.plan import PlanSettings, resolve

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def graph_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Weight set -> graph kind -> ONNX file; each set is exported once, and of mar_tiny what its replays need."""
    found: dict[str, dict[str, Path]] = {}
    for weight_set, case in WEIGHT_SETS.items():
        architecture = load_case(case).architecture
        folder = tmp_path_factory.mktemp(weight_set)
        for kind, spec in graph_specs(architecture).items():
            if weight_set == "mar_tiny" and kind in ("detail_score", "decoder"):
                continue
            path = folder / f"{kind}.onnx"
            export_graph(build_graph_module(kind, architecture, load_weights(weight_set), {}), spec, "fp32", path)
            found.setdefault(weight_set, {})[kind] = path
    return found


@pytest.fixture(scope="module")
def onnx_backends(graph_files: dict[str, dict[str, Path]]) -> dict[str, OnnxRuntimeBackend]:
    return {weight_set: OnnxRuntimeBackend(files, threads=1) for weight_set, files in graph_files.items()}


class Recorder:
    """Networks that keep the condition vectors and their positions."""

    def __init__(self, networks: HostLoopBackend) -> None:
        self.networks, self.name = networks, networks.name
        self.seen: list[tuple[Integers, Floats]] = []

    def backbone(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, conditioning: Arrays
    ) -> BackboneOutput:
        result = self.networks.backbone(tokens, visible, predict, context, conditioning)
        self.seen.append((predict, np.asarray(result.value)))
        return result

    def detail(self, z: BackboneOutput) -> tuple[Floats, Floats]:
        return self.networks.detail(z)

    def denoise(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        return self.networks.denoise(z, chain)


def check_replay(backend: HostLoopBackend, case: GoldenCase) -> None:
    recorder = Recorder(backend)
    seeds = [0] * len(case.labels)
    asked = class_labels(case.labels, case.architecture.classes)
    job = generation_job(case.plan, case.architecture, asked, seeds, case.noise, case.orders)
    latents = generate_on_host(recorder, job)
    assert len(recorder.seen) == case.settings["num_iter"]
    for which, index in (("first", 0), ("last", -1)):
        predict, z = recorder.seen[index]
        rows = []
        for image, token in case.arrays[f"rows_{which}"].tolist():
            (place,) = np.flatnonzero(predict[image] == token)
            rows.append(z[:, image, place])
        assert len(rows) == predict.size
        # Recorded as [2N, D], the conditional half first.
        found = np.stack(rows, axis=1).reshape(-1, z.shape[-1])
        assert relative_error(found, case.arrays[f"z_{which}"]) <= TOLERANCE, f"condition vectors of the {which} step"
    assert relative_error(latents, case.latents) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_torch_reference_replays_the_original(name: str) -> None:
    case = load_case(name)
    check_replay(torch_backend(case.weight_set), case)


@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_replays_the_original(name: str, onnx_backends: dict[str, OnnxRuntimeBackend]) -> None:
    case = load_case(name)
    check_replay(onnx_backends[case.weight_set], case)


def test_replay_depends_on_the_labels(onnx_backends: dict[str, OnnxRuntimeBackend]) -> None:
    """The comparison can fail: other labels give other latents."""
    case = load_case("mar_tiny_cfg_linear")
    seeds = [0] * len(case.labels)
    wrong = [(label + 1) % 10 for label in case.labels]
    backend = onnx_backends["mar_tiny"]
    latents = sample(backend, case.plan, case.architecture, wrong, seeds, case.noise, case.orders)
    assert relative_error(latents, case.latents) > 100 * TOLERANCE


def test_gtr_with_fts_agrees_between_backends(onnx_backends: dict[str, OnnxRuntimeBackend]) -> None:
    """All four graphs, tokens of 4 and 8 steps in one chain, compact context."""
    architecture = load_case(WEIGHT_SETS["digits"]).architecture
    settings = PlanSettings(
        "small",
        (3, 2, 2),
        generation_diffusion=(6, 4),
        reconstruction_diffusion=4,
        fts_diffusion=8,
        max_timestep=950,
        cfg=2.0,
        context="compact",
    )
    plan, seeds = resolve(settings, architecture), [1, 2, 3]
    latents, images = [], []
    for backend in (torch_backend("digits"), onnx_backends["digits"]):
        found = sample(backend, plan, architecture, [3, 1, 4], seeds, SeededNoise(seeds, 16))
        latents.append(found)
        images.append(backend.decode(found))
    assert relative_error(latents[1], latents[0]) <= TOLERANCE
    assert images[0].shape == images[1].shape == (3, 32, 32, 3)
    assert images[0].dtype == images[1].dtype == np.uint8
    assert np.abs(images[0].astype(int) - images[1].astype(int)).max() <= 1


def test_detail_score_graph(onnx_backends: dict[str, OnnxRuntimeBackend]) -> None:
    width = load_case(WEIGHT_SETS["digits"]).architecture.width
    z = np.random.default_rng(0).normal(size=(2, 3, 7, width)).astype(np.float32)
    score, norm = onnx_backends["digits"].detail(BackboneOutput((2, 3, 7, width), z))
    n = np.arange(1, width // 2 + 1)
    magnitude = np.abs(np.fft.fft(z[0].astype(np.float64))[..., 1 : width // 2 + 1])
    np.testing.assert_allclose(score, (magnitude * (1 + n / (width // 2))).sum(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(norm, np.linalg.norm(z[0].astype(np.float64), axis=-1), rtol=1e-5)


def test_patch_decoder_graph(onnx_backends: dict[str, OnnxRuntimeBackend]) -> None:
    """Token (i, j) is the 4 x 4 square of pixels at (4i, 4j), row by row; pixel = round(clip((v + 1) / 2 * 255))."""
    latents = np.random.default_rng(0).uniform(-1.3, 1.3, size=(2, 64, 16)).astype(np.float32)
    for backend in (onnx_backends["digits"], torch_backend("digits")):
        image = backend.decode(latents)
        for picture, token, pixel in [(0, 0, 0), (0, 0, 5), (1, 9, 3), (1, 63, 15), (0, 17, 12), (0, 7, 7)]:
            row, column = token // 8 * 4 + pixel // 4, token % 8 * 4 + pixel % 4
            value = round(min(max((float(latents[picture, token, pixel]) + 1) / 2 * 255, 0), 255))
            assert image[picture, row, column].tolist() == [value] * 3


def test_graphs_keep_the_contract_that_manifests_repeat(graph_files: dict[str, dict[str, Path]]) -> None:
    dtypes = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}
    specs = graph_specs(load_case(WEIGHT_SETS["digits"]).architecture)
    assert tuple(specs) == (*NETWORKS, *ROW_GRAPHS)
    assert specs["backbone"].symbols == ("B", "V", "P", "R", "G")
    for kind, path in graph_files["digits"].items():
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def described(values: list[Any]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(v.name, dtypes[v.type], tuple(v.shape)) for v in values)

        assert described(session.get_inputs()) == specs[kind].inputs
        assert described(session.get_outputs()) == specs[kind].outputs


def test_diffusion_step_graph_against_the_formulas(onnx_backends: dict[str, OnnxRuntimeBackend]) -> None:
    """Guidance, learned variance and the posterior in float64; the head's own outputs come from the torch module."""
    weights = load_weights("mar_tiny")
    case = load_case("mar_tiny_cfg_linear")
    module = build_graph_module("diffusion_step", case.architecture, weights, {})
    rng = np.random.default_rng(3)
    x, noise = rng.normal(size=(2, 5, 16)).astype(np.float32)
    modulation = rng.normal(size=(2, 5, case.architecture.modulation)).astype(np.float32)
    guidance = np.array([1.0, 2.0, 3.0, 0.0, 4.5], dtype=np.float32)
    coefficients = np.array([[1.5, 0.7, 0.2, 0.75, -3.0, -2.0, 0.9]] * 5, dtype=np.float32)
    coefficients[0, 6] = 0.0
    with torch.no_grad():
        eps, variance = (t.double().numpy() for t in module.head(*map(torch.from_numpy, (x, modulation))))
    guided = eps[1] + guidance[:, None] * (eps[0] - eps[1])
    x0 = 1.5 * x - 0.7 * guided
    fraction = (variance[0] + 1) / 2
    deviation = np.exp(0.5 * (fraction * -2.0 + (1 - fraction) * -3.0))
    wanted = 0.2 * x0 + 0.75 * x + coefficients[:, 6:].astype(np.float64) * deviation * noise
    inputs = {
        "x": x,
        "modulation": modulation,
        "coefficients": coefficients,
        "guidance": guidance,
        "noise": noise,
    }
    (found,) = onnx_backends["mar_tiny"].run("diffusion_step", inputs)
    assert relative_error(found, wanted) <= 1e-5


# What a user can get wrong.


def test_missing_graph(graph_files: dict[str, dict[str, Path]]) -> None:
    backend = OnnxRuntimeBackend({"decoder": graph_files["digits"]["decoder"]})
    with pytest.raises(BackendError, match=r"^this bundle has no detail_score graph$"):
        backend.detail(BackboneOutput((1, 1, 1, 96), np.zeros((1, 1, 1, 96), dtype=np.float32)))


def test_wrong_shape_is_one_line(onnx_backends: dict[str, OnnxRuntimeBackend]) -> None:
    with pytest.raises(BackendError, match=r"^ONNX Runtime failed in the decoder graph: ") as error:
        onnx_backends["digits"].decode(np.zeros((1, 63, 16), dtype=np.float32))
    assert "\n" not in str(error.value)


def test_file_that_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "backbone.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(BackendError) as error:
        OnnxRuntimeBackend({"backbone": path})
    assert str(error.value).startswith(f"ONNX Runtime cannot load {path}: ")
    assert "\n" not in str(error.value)


def test_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"^ONNX Runtime is not installed; pip install 'gtr-deploy\[cpu\]'$"):
        OnnxRuntimeBackend({})
