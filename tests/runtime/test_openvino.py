"""The OpenVINO backend on real graphs: the same numbers as ONNX Runtime, one image per seed, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from fakes.bundles import changed
from golden import load_case, load_weights, relative_error
from jobs import sample
from msgspec import structs

from gtr_deploy.calibration.layers import DEFAULT_KEEP, QUANTISED_KINDS, quantisable, read_graph
from gtr_deploy.calibration.quantize import quantise_graph
from gtr_deploy.calibration.ranges import Range
from gtr_deploy.export.graphs.onnx_export import export_graph
from gtr_deploy.export.networks import build_graph_module
from gtr_deploy.export.verify.graph_inputs import graph_inputs
from gtr_deploy.runtime.backends import choice
from gtr_deploy.runtime.backends.choice import open_backend
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.backends.openvino.backend import OpenVinoBackend
from gtr_deploy.runtime.backends.openvino.library import reason
from gtr_deploy.runtime.backends.row import BackendOptions
from gtr_deploy.runtime.bundle.manifest import GraphFiles
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.machine.openvino import import_openvino
from gtr_deploy.runtime.models.families import graph_specs
from gtr_deploy.runtime.models.graphs import IMAGE_TOLERANCES, NETWORKS
from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.sampling.plan import PRESETS

openvino = import_openvino()


def networks(bundle: Bundle) -> dict[str, Path]:
    paths = bundle.graph_paths(checksums=False, target="cpu")
    return {kind: paths[kind] for kind in NETWORKS}


def pipeline(bundle: Bundle, backend: Any) -> Pipeline:
    return Pipeline(bundle.architecture, bundle.conditioner, backend, dict(bundle.plan_defaults))


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    return Bundle.load(digits_bundle)


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> OpenVinoBackend:
    return OpenVinoBackend(networks(bundle), 1)


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(networks(bundle), 1)


@pytest.fixture(scope="module")
def int8_graphs(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The large graphs quantised for CPUs; any ranges do."""
    folder, graphs = tmp_path_factory.mktemp("int8"), {}
    for kind in QUANTISED_KINDS:
        path = networks(bundle)[kind]
        layers = [layer.name for layer in quantisable(read_graph(path))]
        chosen = [name for name in layers if name not in DEFAULT_KEEP]
        graphs[kind] = folder / f"{kind}.onnx"
        quantise_graph(path, graphs[kind], dict.fromkeys(layers, Range(-4.0, 4.0)), "cpu", chosen)
    return graphs


class TestGraphs:
    @pytest.mark.parametrize("kind", NETWORKS)
    def test_same_as_onnx_runtime(
        self, bundle: Bundle, backend: OpenVinoBackend, reference: OnnxRuntimeBackend, kind: str
    ) -> None:
        spec = graph_specs(bundle.architecture, 2)[kind]
        for sizes in (spec.smallest, spec.usual, spec.largest):
            inputs = graph_inputs(spec, bundle.architecture, bundle.conditioner, sizes)
            for found, wanted in zip(backend.run(kind, inputs), reference.run(kind, inputs), strict=True):
                assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
                assert relative_error(found, wanted) <= spec.tolerances["fp32"]

    @pytest.mark.parametrize(("known", "others"), [(0, 0), (0, 5), (5, 0), (0, 63), (63, 0)])
    def test_axes_of_size_0(
        self, bundle: Bundle, backend: OpenVinoBackend, reference: OnnxRuntimeBackend, known: int, others: int
    ) -> None:
        spec = graph_specs(bundle.architecture)["backbone"]
        for batch, branches in ((1, 1), (3, 2)):
            sizes = {"G": branches, "B": batch, "V": known, "P": 1, "R": others}
            inputs = graph_inputs(spec, bundle.architecture, bundle.conditioner, sizes)
            (found,), (wanted,) = backend.run("backbone", inputs), reference.run("backbone", inputs)
            assert relative_error(found, wanted) <= spec.tolerances["fp32"]

    @pytest.mark.parametrize("kind", QUANTISED_KINDS)
    def test_int8(self, bundle: Bundle, int8_graphs: dict[str, Path], kind: str) -> None:
        paths = {kind: int8_graphs[kind]}
        spec = graph_specs(bundle.architecture)[kind]
        inputs = graph_inputs(spec, bundle.architecture, bundle.conditioner, spec.usual)
        (found,), (wanted,) = (
            OpenVinoBackend(paths, 1).run(kind, inputs),
            OnnxRuntimeBackend(paths, 1).run(kind, inputs),
        )
        assert relative_error(found, wanted) <= spec.tolerances["int8"]

    def test_results_are_the_callers_own(self, bundle: Bundle, backend: OpenVinoBackend) -> None:
        spec = graph_specs(bundle.architecture)["detail_score"]
        inputs = graph_inputs(spec, bundle.architecture, bundle.conditioner, spec.usual)
        first, _ = backend.run("detail_score", inputs)
        kept = first.copy()
        backend.run("detail_score", {"z": 2 * inputs["z"]})
        assert np.array_equal(first, kept)

    def test_threads_take_turns(self, bundle: Bundle, backend: OpenVinoBackend) -> None:
        """Each of four threads gets the answer to its own question."""
        spec = graph_specs(bundle.architecture)["diffusion_step"]
        calls = [
            graph_inputs(spec, bundle.architecture, bundle.conditioner, {"G": 2, "N": 3 + index % 4})
            for index in range(24)
        ]
        for index, call in enumerate(calls):
            call["x"] = call["x"] + np.float32(index)
        alone = [backend.run("diffusion_step", call)[0] for call in calls]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda call: backend.run("diffusion_step", call)[0], calls))
        for found, wanted in zip(together, alone, strict=True):
            assert np.array_equal(found, wanted)

    def test_threads_are_those_asked_for(self, bundle: Bundle) -> None:
        program = OpenVinoBackend({"detail_score": networks(bundle)["detail_score"]}, 1)._programs["detail_score"]
        compiled = program._requests[0].get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert compiled.get_property("NUM_STREAMS") == 1


class TestImages:
    @pytest.mark.parametrize(
        "plan", [*(name for name in PRESETS if name not in ("mar", "mar-256")), "gtr-fast:guidance-interval=0.1+0.5"]
    )
    def test_same_picture_as_onnx_runtime(
        self, bundle: Bundle, backend: OpenVinoBackend, reference: OnnxRuntimeBackend, plan: str
    ) -> None:
        """The two presets left out run the most steps, of the same shapes."""
        found = pipeline(bundle, backend).generate([3, 7], plan=plan)
        wanted = pipeline(bundle, reference).generate([3, 7], plan=plan)
        assert relative_error(found.latents, wanted.latents) <= IMAGE_TOLERANCES["fp32"]
        assert np.abs(found.images.astype(int) - wanted.images).max() <= 1

    def test_one_seed_one_image(self, bundle: Bundle, backend: OpenVinoBackend) -> None:
        together = pipeline(bundle, backend).generate([3, 7, 1], [5, 6, 7], plan="gtr-fast")
        alone = pipeline(bundle, backend).generate([7], [6], plan="gtr-fast")
        assert relative_error(alone.latents[0], together.latents[1]) <= IMAGE_TOLERANCES["fp32"]
        assert relative_error(alone.latents[0], together.latents[0]) > 0.1

    def test_fp16(self, build_digits: Callable[[str], Path], bundle: Bundle, reference: OnnxRuntimeBackend) -> None:
        half = Bundle.load(build_digits("fp16"))
        found = pipeline(half, OpenVinoBackend(networks(half), 1)).generate([3, 7], plan="gtr-fast")
        wanted = pipeline(bundle, reference).generate([3, 7], plan="gtr-fast")
        assert 0 < relative_error(found.latents, wanted.latents) <= IMAGE_TOLERANCES["fp16"]

    @pytest.mark.slow
    def test_replays_the_original(self, tmp_path: Path) -> None:
        """A generation recorded from the original MAR code; tests/export/test_golden.py has more of them."""
        case = load_case("mar_tiny_cfg_linear")
        paths: dict[str, Path] = {}
        for kind in QUANTISED_KINDS:
            paths[kind] = tmp_path / f"{kind}.onnx"
            module = build_graph_module(kind, case.architecture, load_weights(case.weight_set), {})
            export_graph(module, graph_specs(case.architecture)[kind], "fp32", paths[kind])
        backend, seeds = OpenVinoBackend(paths, 1), [0] * len(case.labels)

        def replay(labels: list[int]) -> float:
            latents = sample(backend, case.plan, case.architecture, labels, seeds, case.noise, case.orders)
            return relative_error(latents, case.latents)

        assert replay(case.labels) <= 1e-4
        assert replay([(label + 1) % 10 for label in case.labels]) > 1e-2

    def test_values_that_are_not_finite(self, bundle: Bundle, backend: OpenVinoBackend) -> None:
        class Broken:
            def draw(self, images: Any, positions: Any, steps: int) -> Any:
                return np.full((len(images), steps + 1, bundle.architecture.token_channels), np.nan, np.float32)

        with pytest.raises(BackendError, match=r"AR step 1 of \d+ gave values that are not finite on backend openvino"):
            pipeline(bundle, backend).generate([3], plan="gtr-fast", noise=Broken())


class TestOpening:
    def test_a_quantised_bundle_gives_its_graphs_for_cpus(self, own_bundle: Path, int8_graphs: dict[str, Path]) -> None:
        (own_bundle / "graphs" / "cpu.onnx").write_bytes(int8_graphs["diffusion_step"].read_bytes())
        bundle = Bundle.load(own_bundle)
        step = structs.replace(bundle.graphs["diffusion_step"], cpu=GraphFiles.of(own_bundle, "graphs/cpu.onnx"))
        quantised = changed(bundle, graphs={**bundle.graphs, "diffusion_step": step})
        spec = graph_specs(bundle.architecture)["diffusion_step"]
        inputs = graph_inputs(spec, bundle.architecture, bundle.conditioner, spec.usual)
        opened: Any = open_backend(quantised, BackendOptions("openvino", threads=1))
        (found,) = opened.run("diffusion_step", inputs)
        (wanted,) = OpenVinoBackend(int8_graphs, 1).run("diffusion_step", inputs)
        assert np.array_equal(found, wanted)
        plain: Any = open_backend(bundle, BackendOptions("openvino", threads=1))
        assert not np.array_equal(plain.run("diffusion_step", inputs)[0], wanted)
        assert (opened.name, opened.description) == ("openvino", "openvino cpu")

    def test_without_openvino(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(
            BackendError, match=r"^OpenVINO cannot be imported: .*; pip install 'gtr-deploy\[openvino\]'$"
        ):
            OpenVinoBackend({})

    def test_a_version_that_is_too_old(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choice, "library_version", lambda library: "2025.4.0-20398-8fdad55727d")
        with pytest.raises(BackendError, match=r"is too old, 2026\.3 is needed; pip install 'gtr-deploy"):
            open_backend(bundle, BackendOptions("openvino"))

    @pytest.mark.parametrize("damage", ["empty", "text", "half", "missing"])
    def test_damaged_graphs(
        self, bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
    ) -> None:
        whole, path = networks(bundle)["decoder"].read_bytes(), tmp_path / "decoder.onnx"
        if damage != "missing":
            path.write_bytes({"empty": b"", "text": b"not a graph\n" * 9, "half": whole[: len(whole) // 2]}[damage])
        with pytest.raises(BackendError, match=r"^OpenVINO cannot (read|compile) .*decoder\.onnx: ") as caught:
            OpenVinoBackend({"decoder": path})
        assert "\n" not in str(caught.value)
        assert "Exception from" not in str(caught.value)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"x": np.zeros((4, 16))}, "with precision: f64, since the model input tensor precision is: f32"),
            ({"x": np.zeros((4, 9), np.float32)}, r"\[\?,16\]\) and the tensor \(shape=\(4.9\)\) are incompatible"),
            ({"x": np.zeros((3, 16), np.float32)}, "mismatch"),
            ({"guidance": np.zeros(4, np.int32)}, "precision: i32"),
            ({"temperature": np.zeros(4, np.float32)}, "no input temperature"),
        ],
    )
    def test_calls_that_do_not_fit(
        self, bundle: Bundle, backend: OpenVinoBackend, changes: dict[str, Any], words: str
    ) -> None:
        spec = graph_specs(bundle.architecture)["diffusion_step"]
        inputs = graph_inputs(spec, bundle.architecture, bundle.conditioner, {"G": 2, "N": 4})
        with pytest.raises(BackendError, match=words) as caught:
            backend.run("diffusion_step", {**inputs, **changes})
        assert "\n" not in str(caught.value)
        assert np.isfinite(backend.run("diffusion_step", inputs)[0]).all()

    def test_a_graph_that_is_not_there(self) -> None:
        with pytest.raises(BackendError, match=r"^this bundle has no decoder graph$"):
            OpenVinoBackend({}).decode(np.zeros((1, 64, 16), np.float32))

    def test_reason_is_the_line_that_tells_something(self) -> None:
        text = "Exception from src/a.cpp:1:\nCheck 'b' failed at src/b.cpp:2:\nthe shapes differ\n\n\n"
        assert reason(RuntimeError(text)) == "the shapes differ"
        assert reason(RuntimeError("Exception from src/a.cpp:1:\n")) == "Exception from src/a.cpp:1:"
        assert reason(RuntimeError("")) == "RuntimeError"


class TestCommands:
    ARGUMENTS = ("--classes", "3", "--plan", "gtr-fast", "--stage-steps", "2,1,1")

    def test_generate(self, run_cli: Callable[..., Result], digits_bundle: Path, tmp_path: Path) -> None:
        options = ("--out", tmp_path, "--backend", "openvino", "--threads", "1", "--json")
        result = run_cli("generate", digits_bundle, *self.ARGUMENTS, *options)
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert (report["backend"], report["backend_why"]) == ("openvino", None)
        assert list(tmp_path.glob("*.png"))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--provider", "cpu"], "--provider cpu is for onnxruntime and torch, not for openvino"),
            (["--device", "1"], "--device 1 is the index of a GPU; openvino runs on the CPU"),
            (["--cuda-graph", "step"], "--cuda-graph step is for GPUs; openvino runs on the CPU"),
        ],
    )
    def test_options_that_do_not_go_with_it(
        self, run_cli: Callable[..., Result], digits_bundle: Path, tmp_path: Path, options: list[str], words: str
    ) -> None:
        result = run_cli(
            "generate", digits_bundle, *self.ARGUMENTS, "--out", tmp_path, "--backend", "openvino", *options
        )
        assert result.exit_code == 2
        assert words in result.stderr.splitlines()[-1]

    def test_alone(self, digits_bundle: Path, tmp_path: Path) -> None:
        """Neither ONNX Runtime nor anything of the export side; and OpenVINO reports its use to nobody."""
        refused = ("onnxruntime", "torch", "onnx", "openvino_telemetry")
        arguments = ["generate", str(digits_bundle), *self.ARGUMENTS, "--out", str(tmp_path), "--json"]
        program = f"""
import sys
asked = []
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            asked.append(name)
            raise ImportError(name + " must not be imported here")
sys.meta_path.insert(0, Refuse())
from gtr_deploy.runtime.cli import main
try:
    main({arguments!r})
finally:
    assert not [name for name in asked if "telemetry" in name], asked
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["backend"] == "openvino"
        assert "ONNX Runtime is not installed" in report["backend_why"]
