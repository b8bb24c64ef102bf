"""Which backend runs a bundle, and ONNX Runtime's bound path: on the CPU provider the same calls as on CUDA."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import Result
from fakes.bundles import changed
from golden import relative_error
from msgspec import structs

from gtr_deploy.runtime.backends.blocks import ALIGNMENT, packed
from gtr_deploy.runtime.backends.choice import choose_backend, open_backend, resolve_backend
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.backends.registry import OPENVINO_PRECISIONS
from gtr_deploy.runtime.backends.row import BackendOptions
from gtr_deploy.runtime.bundle.manifest import EngineGraph, EngineSet
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import BackendError, GtrError, UsageError
from gtr_deploy.runtime.machine.examine import Gpu, Machine, examine_machine
from gtr_deploy.runtime.models.graphs import IMAGE_TOLERANCES
from gtr_deploy.runtime.pipeline import Generation, Pipeline

CUDA = "CUDAExecutionProvider"
GPU = Gpu("Test GPU", "8.9", 2**34, "13.0")
BARE = Machine("linux-x86_64", None, "no driver", {"onnxruntime": "1.31.1"}, ("CPUExecutionProvider",))
WITH_CUDA = replace(BARE, gpu=GPU, gpu_problem="", onnxruntime_providers=(CUDA, "CPUExecutionProvider"))

no_cuda_here = pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    return Bundle.load(digits_bundle)


def _generate(
    bundle: Bundle, backend: OnnxRuntimeBackend, plan: str = "gtr-fast", labels: tuple = (3, 1)
) -> Generation:
    return Pipeline(bundle.architecture, bundle.conditioner, backend, dict(bundle.plan_defaults)).generate(
        list(labels), plan=plan
    )


class TestBound:
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    @pytest.mark.parametrize("fixed", [False, True])
    @pytest.mark.filterwarnings("error")
    def test_same_numbers_as_plain_calls(
        self, build_digits: Callable[[str], Path], precision: str, fixed: bool
    ) -> None:
        """gtr-fast has guidance, one and two segments per chain, and scores by the detail graph."""
        bundle = Bundle.load(build_digits(precision))
        paths = bundle.graph_paths()
        backend = OnnxRuntimeBackend(paths, threads=1, bound=True, cuda_graphs=fixed)
        plain = _generate(bundle, OnnxRuntimeBackend(paths, threads=1))
        for _ in range(2):  # the second time on buffers that hold something
            found = _generate(bundle, backend)
            np.testing.assert_allclose(found.latents, plain.latents, rtol=0, atol=1e-6)
            assert np.array_equal(found.images, plain.images)
        alone = _generate(bundle, backend, labels=(3,))  # another shape, then the first one's buffers again
        assert relative_error(alone.latents[0], plain.latents[0]) <= IMAGE_TOLERANCES[precision]
        np.testing.assert_allclose(_generate(bundle, backend).latents, plain.latents, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("changes", ["cfg=1", "cfg=2,guidance-interval=0.1+0.5"])
    def test_without_guidance(self, bundle: Bundle, changes: str) -> None:
        plan = f"gtr-fast:{changes}"
        paths = bundle.graph_paths()
        results = [
            Pipeline(bundle.architecture, bundle.conditioner, OnnxRuntimeBackend(paths, 1, bound=bound)).generate(
                [5], plan=plan
            )
            for bound in (False, True)
        ]
        np.testing.assert_allclose(results[1].latents, results[0].latents, rtol=0, atol=1e-6)

    def test_z_and_score_are_what_plain_calls_give(self, bundle: Bundle) -> None:
        rng, order = np.random.default_rng(0), np.random.default_rng(1).permutation(64)
        arguments = (
            rng.normal(size=(1, 5, 16)).astype(np.float32),
            order[None, :5],
            order[None, 5:12],
            order[None, 12:],
            {"labels": np.array([[3], [10]])},
        )
        plain, bound = (OnnxRuntimeBackend(bundle.graph_paths(), 1, bound=bound) for bound in (False, True))
        here, there = plain.backbone(*arguments), bound.backbone(*arguments)
        assert here.shape == there.shape == (2, 1, 7, bundle.architecture.width)
        np.testing.assert_allclose(there.value.numpy(), here.value, rtol=0, atol=1e-6)
        for one, other in zip(plain.detail(here), bound.detail(there), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-6)

    def test_goes_on_without_graphs_when_they_fail(self, bundle: Bundle) -> None:
        """A session that cannot run stands for one whose capture fails: one warning, then the plain session."""
        paths = bundle.graph_paths()
        backend = OnnxRuntimeBackend(paths, 1, bound=True, cuda_graphs=True)
        backend._sessions["diffusion_step"] = backend._sessions["decoder"]
        with pytest.warns(RuntimeWarning, match="could not use CUDA graphs, going on without") as caught:
            found = _generate(bundle, backend)
        assert len(caught) == 1
        assert np.array_equal(found.images, _generate(bundle, OnnxRuntimeBackend(paths, 1)).images)

    def test_errors_are_one_line(self, bundle: Bundle) -> None:
        backend = OnnxRuntimeBackend({"decoder": bundle.graph_paths()["decoder"]}, bound=True)
        integers = np.zeros((1, 1), np.int64)
        with pytest.raises(BackendError, match=r"^this bundle has no backbone graph$"):
            backend.backbone(np.zeros((1, 0, 16), np.float32), integers, integers, integers, {"labels": integers})
        backend = OnnxRuntimeBackend(bundle.graph_paths(), bound=True)
        with pytest.raises(BackendError, match="failed in the backbone graph") as caught:
            backend.backbone(np.zeros((1, 0, 9), np.float32), integers[:, :0], integers, integers, {"labels": integers})
        assert "\n" not in str(caught.value)

    def test_packed_entries_are_aligned_and_whole(self) -> None:
        tables = [np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(5, dtype=np.int64)[None]]
        places, raw = packed(tables)
        for table, place in zip(tables, places, strict=True):
            for index, entry in enumerate(table):
                assert place.at(0, index) % ALIGNMENT == 0
                stored = raw[place.at(0, index) : place.at(0, index) + entry.nbytes]
                assert np.array_equal(stored.view(table.dtype), entry)


class TestCudaProvider:
    @no_cuda_here
    def test_missing_provider_is_one_line(self, bundle: Bundle) -> None:
        with pytest.raises(
            BackendError, match=r"no CUDAExecutionProvider .*pip install 'gtr-deploy\[gpu\]'$"
        ) as caught:
            OnnxRuntimeBackend(bundle.graph_paths(), provider="cuda")
        assert "\n" not in str(caught.value)

    def test_unknown_provider(self) -> None:
        with pytest.raises(BackendError, match="provider 'rocm' is not one of cpu, cuda"):
            OnnxRuntimeBackend({}, provider="rocm")

    def test_without_onnx_runtime(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(BackendError, match=r"not installed; pip install 'gtr-deploy\[gpu\]'$"):
            OnnxRuntimeBackend({}, provider="cuda")

    def test_description(self) -> None:
        assert OnnxRuntimeBackend({}).description == "onnxruntime cpu"


def _engines(bundle: Bundle, flavour: str, version: str) -> EngineSet:
    """A set that fits GPU, with the files of the graphs in place of engines, which are not opened here."""
    graphs = {kind: EngineGraph(files.model, *files.checksums, (), 1.0, None) for kind, files in bundle.graphs.items()}
    plans = ("gtr",)
    return EngineSet(flavour, version, ("8.9",), None, "linux-x86_64", False, plans, 8, "fp32", 3, graphs)


class TestChoice:
    def test_cpu_and_cuda(self, bundle: Bundle) -> None:
        assert choose_backend(bundle, BARE) == ("onnxruntime", "on the CPU: no driver")
        name, why = choose_backend(bundle, WITH_CUDA)
        assert name == "onnxruntime"
        assert "no engines" in why
        assert "CUDA provider runs on Test GPU" in why
        name, why = choose_backend(bundle, replace(WITH_CUDA, onnxruntime_providers=("CPUExecutionProvider",)))
        assert (name, why) == ("onnxruntime", "on the CPU: this onnxruntime has no CUDA provider")

    @pytest.mark.parametrize(
        ("precision", "installed", "capabilities", "chosen", "words"),
        [
            ("fp32", ("onnxruntime", "openvino"), ("FP32", "BF16"), "onnxruntime", "on the CPU: no driver"),
            ("int8", ("onnxruntime", "openvino"), ("FP32",), "onnxruntime", "on the CPU: no driver"),
            ("fp32", ("openvino",), ("FP32",), "openvino", "on the CPU: no driver; ONNX Runtime is not installed"),
            ("bf16", ("onnxruntime", "openvino"), ("FP32", "BF16"), "openvino", "ONNX Runtime does not"),
            ("bf16", ("openvino",), ("FP32",), "openvino", "this CPU has no bfloat16, float32 takes its place"),
            ("bf16", ("onnxruntime",), (), "onnxruntime", "on the CPU: no driver"),
            ("fp8", ("openvino",), ("FP32",), "onnxruntime", "on the CPU: no driver"),
            ("fp32", (), (), "onnxruntime", "on the CPU: no driver"),
        ],
    )
    def test_on_cpus(
        self,
        bundle: Bundle,
        precision: str,
        installed: tuple[str, ...],
        capabilities: tuple[str, ...],
        chosen: str,
        words: str,
    ) -> None:
        versions = {"onnxruntime": "1.31.1", "openvino": "2026.4.1"}
        machine = replace(
            BARE,
            versions={name: version for name, version in versions.items() if name in installed},
            openvino_capabilities=capabilities,
        )
        name, why = choose_backend(changed(bundle, precision=precision), machine)
        assert name == chosen
        assert why.endswith(words)
        assert "\n" not in why

    @pytest.mark.parametrize("feature", ["avx512_vnni", "avx_vnni"])
    def test_the_cpu_decides_between_the_two(self, bundle: Bundle, feature: str) -> None:
        machine = replace(BARE, versions={"onnxruntime": "1.31.1", "openvino": "2026.4.1"})
        vnni = replace(machine, cpu_features=("avx2", feature))
        for precision in OPENVINO_PRECISIONS:
            assert choose_backend(changed(bundle, precision=precision), machine)[0] == "onnxruntime"
            name, why = choose_backend(changed(bundle, precision=precision), vnni)
            assert name == "openvino"
            assert "on CPUs with VNNI" in why
            amx = replace(vnni, cpu_features=("avx2", feature, "amx_int8"))
            assert choose_backend(changed(bundle, precision=precision), amx)[0] == "onnxruntime"
        assert choose_backend(changed(bundle, precision="fp16"), vnni)[0] == "onnxruntime"

    def test_an_old_openvino_is_not_chosen(self, bundle: Bundle) -> None:
        machine = replace(BARE, versions={"openvino": "2025.4.0"})
        assert choose_backend(bundle, machine)[0] == "onnxruntime"

    def test_cuda_comes_before_openvino(self, bundle: Bundle) -> None:
        machine = replace(WITH_CUDA, versions={"onnxruntime": "1.31.1", "openvino": "2026.4.1"})
        assert choose_backend(changed(bundle, precision="bf16"), machine)[0] == "onnxruntime"

    def test_bfloat16_convolutions_are_not_given_to_onnx_runtime_on_cuda(self, bundle: Bundle) -> None:
        machine = replace(WITH_CUDA, versions={"onnxruntime": "1.31.1", "openvino": "2026.4.1"})
        decoder = structs.replace(bundle.architecture.decoder, kind="kl")
        with_vae = replace(
            changed(bundle, precision="bf16"), architecture=structs.replace(bundle.architecture, decoder=decoder)
        )
        name, why = choose_backend(with_vae, machine)
        assert name == "openvino"
        assert "onnxruntime #25740" in why
        assert f"gtr-export engine {bundle.folder} --engine tensorrt, or gtr-export build --model" in why
        assert choose_backend(changed(with_vae, precision="fp16"), machine)[0] == "onnxruntime"

    def test_engines_that_fit_come_first(self, bundle: Bundle) -> None:
        rtx, full = _engines(bundle, "tensorrt-rtx", "1.7.0"), _engines(bundle, "tensorrt", "11.4.0")
        both = changed(bundle, engines=(rtx, full))
        machine = replace(WITH_CUDA, versions={"tensorrt": "11.4.0", "tensorrt-rtx": "1.7.0", "cuda-bindings": "13.0"})
        assert choose_backend(both, machine) == ("tensorrt", f"the bundle's engines {full.key} run here")
        machine = replace(WITH_CUDA, versions={"tensorrt": "10.16.0", "tensorrt-rtx": "1.7.0", "cuda-bindings": "13.0"})
        assert choose_backend(both, machine)[0] == "tensorrt-rtx"
        name, why = choose_backend(both, WITH_CUDA)
        assert name == "onnxruntime"
        assert f"engines {full.key} cannot run here (TensorRT 11.4.0 is needed and not installed" in why
        assert "\n" not in why

    def test_provider_alone_means_onnx_runtime(self, bundle: Bundle) -> None:
        options, why = resolve_backend(bundle, BackendOptions(provider="cpu"))
        assert options == BackendOptions("onnxruntime", "cpu")
        assert why == "--provider cpu is ONNX Runtime's"
        assert resolve_backend(bundle, options) == (options, None)

    @pytest.mark.parametrize(
        ("options", "error", "line"),
        [
            (BackendOptions("caffe"), BackendError, "backend 'caffe' is not one of auto, onnxruntime, openvino, "),
            (BackendOptions(provider="tpu"), BackendError, "provider 'tpu' is not one of auto, cpu, cuda"),
            (BackendOptions(cuda_graph="on"), BackendError, "CUDA graph mode 'on' is not one of auto, generation, "),
            (BackendOptions("tensorrt", "cpu"), UsageError, "--provider cpu is for onnxruntime and torch, not for "),
            (BackendOptions("openvino", "cuda"), UsageError, "--provider cuda is for onnxruntime and torch, not for "),
            (BackendOptions("openvino", device=1), UsageError, "--device 1 is the index of a GPU; openvino runs on "),
            (BackendOptions("openvino", cuda_graph="step"), UsageError, "--cuda-graph step is for GPUs; openvino runs"),
            (BackendOptions("onnxruntime", precision="fp16"), UsageError, "precision fp16: only torch has a choice"),
        ],
    )
    def test_options_that_make_no_sense(
        self, bundle: Bundle, options: BackendOptions, error: type[GtrError], line: str
    ) -> None:
        with pytest.raises(error, match=line) as caught:
            open_backend(bundle, options)
        assert "\n" not in str(caught.value)

    def test_bfloat16_on_the_cpu_provider(self, build_digits: Callable[[str], Path]) -> None:
        bundle = Bundle.load(build_digits("bf16"))
        with pytest.raises(BackendError, match="no bfloat16 matrix product; use an fp32 or fp16 bundle"):
            open_backend(bundle, BackendOptions("onnxruntime", "cpu"))

    def test_fp8_on_openvino(self, bundle: Bundle) -> None:
        with pytest.raises(BackendError, match=r"rounds to fp8 twice.* --backend onnxruntime --provider cpu$"):
            open_backend(changed(bundle, precision="fp8"), BackendOptions("openvino"))

    def test_torch_through_its_entry_point(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        metadata = tmp_path / "gtr_backends-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gtr-backends\nVersion: 1\n")
        lines = "[gtr_deploy.backends]\ntorch = gtr_deploy.export.reference.backend_row:TORCH\n"
        (metadata / "entry_points.txt").write_text(lines)
        monkeypatch.syspath_prepend(tmp_path)
        before = torch.get_num_threads()
        try:
            backend = open_backend(bundle, BackendOptions("torch", "cpu", threads=1, precision="fp16"))
        finally:
            torch.set_num_threads(before)
        assert backend.name == "torch"
        assert getattr(backend, "description", "") == "torch cpu fp16"

    def test_torch_without_the_export_side(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", [])
        line = r"^the torch backend comes with the export side; pip install 'gtr-deploy\[export\]'$"
        with pytest.raises(BackendError, match=line):
            open_backend(bundle, BackendOptions("torch", "cpu"))


class TestCommands:
    ARGUMENTS = ("--plan", "gtr-fast", "--stage-steps", "2,1,1")

    def test_generate_says_which_and_why(
        self, run_cli: Callable[..., Result], digits_bundle: Path, tmp_path: Path
    ) -> None:
        arguments = ("generate", digits_bundle, "--classes", "3", *self.ARGUMENTS, "--out")
        wanted, why = choose_backend(Bundle.load(digits_bundle), examine_machine())
        said = run_cli(*arguments, tmp_path / "1")
        assert said.exit_code == 0, said.output
        assert f"backend {wanted}: {why}" in said.stderr
        report = json.loads(run_cli(*arguments, tmp_path / "2", "--json").stdout)
        assert (report["backend"], report["backend_why"]) == (wanted, why)
        asked = run_cli(
            *arguments, tmp_path / "3", "--backend", "onnxruntime", "--provider", "cpu", "--cuda-graph", "off", "--json"
        )
        assert json.loads(asked.stdout)["backend_why"] is None

    def test_bench_says_it_too(self, run_cli: Callable[..., Result], digits_bundle: Path) -> None:
        result = run_cli("bench", digits_bundle, *self.ARGUMENTS, "--repeat", 1, "--provider", "cpu", "--json")
        report = json.loads(result.stdout)
        assert (report["backend"], report["backend_why"]) == ("onnxruntime", "--provider cpu is ONNX Runtime's")

    @pytest.mark.parametrize(
        ("options", "code", "words"),
        [
            (["--backend", "caffe"], 2, "--backend"),
            (["--provider", "rocm"], 2, "--provider"),
            (["--cuda-graph", "always"], 2, "--cuda-graph"),
            (["--device", "-1"], 2, "--device"),
            (["--backend", "tensorrt", "--provider", "cpu"], 2, "not for tensorrt"),
            pytest.param(["--provider", "cuda"], 1, "gtr-deploy[gpu]", marks=no_cuda_here),
        ],
    )
    def test_errors(
        self,
        run_cli: Callable[..., Result],
        digits_bundle: Path,
        tmp_path: Path,
        options: list[str],
        code: int,
        words: str,
    ) -> None:
        result = run_cli("generate", digits_bundle, "--classes", "3", "--out", tmp_path, *options)
        assert result.exit_code == code, result.output
        assert words in result.stderr.splitlines()[-1]

    def test_doctor_is_a_command(self, run_cli: Callable[..., Result]) -> None:
        assert "doctor" in run_cli("--help").stdout
