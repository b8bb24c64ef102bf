"""Engines of the shipped model with the real TensorRT-RTX builder, which needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kinds import KINDS

from gtr_deploy.export.build.build import build
from gtr_deploy.export.build.request import BuildRequest
from gtr_deploy.export.engines.graph import BuildSettings, BuiltGraph, build_graph
from gtr_deploy.export.engines.target import Target, choose_target
from gtr_deploy.export.verify.graph_inputs import graph_inputs
from gtr_deploy.runtime.bundle.graph_file import GraphFile
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Phases, Reporter
from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.machine.examine import Machine
from gtr_deploy.runtime.models.families import graph_specs
from gtr_deploy.runtime.models.graphs import GraphSpec
from gtr_deploy.runtime.sampling.shapes import Profile

pytest.importorskip("tensorrt_rtx", reason="the real builder is TensorRT-RTX; pip install 'gtr-deploy[tensorrt-rtx]'")

QUIET = Reporter(quiet=True)
NO_GPU = Machine("linux-x86_64", None, "no driver", {"tensorrt-rtx": "x"}, ())


@pytest.fixture(scope="module")
def target() -> Target:
    return choose_target("tensorrt-rtx", ("8.9",), False, NO_GPU, "")


def contract_profile(spec: GraphSpec) -> Profile:
    """The shapes that the graph is verified at."""
    return {k: tuple(sorted((spec.smallest[k], spec.usual[k], spec.largest[k]))) for k in spec.smallest}  # type: ignore[misc]


def _graph(path: Path) -> GraphFile:
    return GraphFile(path, path.read_bytes())


def build_one(
    folder: Path, kind: str, target: Target, out: Path, precision: str | None = None, reporter: Reporter = QUIET
) -> BuiltGraph:
    bundle = Bundle.load(folder)
    spec = graph_specs(bundle.architecture, bundle.max_batch)[kind]
    settings = BuildSettings(precision or bundle.precision, optimization_level=0)
    graph = _graph(folder / bundle.graphs[kind].model.file)
    return build_graph(graph, spec, [contract_profile(spec)], target, settings, out, reporter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_graph_builds_in_its_own_precision(
    build_digits: Callable[[str], Path], target: Target, tmp_path: Path, precision: str, kind: str
) -> None:
    out = tmp_path / "engines" / f"{kind}.engine"
    built = build_one(build_digits(precision), kind, target, out)
    assert out.stat().st_size > 10_000
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert not built.warnings
    assert "not inspected: needs a GPU" in built.audit.source
    if kind in ("backbone", "modulation", "diffusion_step"):
        layers = dict(built.audit.layers)
        assert layers.pop(precision) >= {"backbone": 12, "modulation": 2, "diffusion_step": 7}[kind]
        assert sum(layers.values()) <= 3, "what the bundle leaves in float32"
    elif kind == "detail_score":
        assert set(built.audit.layers) == {"fp32"}
    else:
        assert built.audit.layers == {}


@pytest.mark.parametrize("kind", ["backbone", "modulation", "diffusion_step"])
def test_quantized_graphs_build(own_bundle: Path, target: Target, tmp_path: Path, kind: str) -> None:
    quantize(own_bundle, kind, tmp_path)
    built = build_one(own_bundle, kind, target, tmp_path / f"{kind}.engine", "int8")
    assert built.audit.layers["int8"] > sum(built.audit.layers.values()) / 2
    assert (tmp_path / f"{kind}.engine").stat().st_size > 10_000


def quantize(folder: Path, kind: str, scratch: Path) -> None:
    """Replaces a bundle's fp32 graph by one with Q/DQ around every matrix product with constant weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    bundle = Bundle.load(folder)
    spec = graph_specs(bundle.architecture, bundle.max_batch)[kind]
    batches = [graph_inputs(spec, bundle.architecture, bundle.conditioner, spec.usual, seed) for seed in range(3)]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[Mapping[str, Any]] = iter(batches)

        def get_next(self) -> Any:
            return next(self._left, None)

    path = folder / "graphs" / f"{kind}.onnx"
    shutil.copy2(path, scratch / "float.onnx")
    quantize_static(
        str(scratch / "float.onnx"),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "MatMulConstBOnly": True},
    )


@pytest.mark.slow
def test_mar_b_builds_in_half_precision(target: Target, tmp_path: Path) -> None:
    folder = tmp_path / "mar-b"
    build(BuildRequest("mar-b", folder, random_weights=True, precision="fp16"), QUIET)
    for kind in KINDS:
        built = build_one(folder, kind, target, tmp_path / f"{kind}.engine")
        if kind in ("backbone", "modulation", "diffusion_step", "decoder"):
            assert built.audit.layers["fp16"] > 0.8 * sum(built.audit.layers.values())


def test_parse_errors_name_the_graph_and_every_node(digits_bundle: Path, target: Target, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(digits_bundle / "graphs" / "decoder.onnx"))
    for index in (1, 2):
        value = model.graph.output[0].name
        model.graph.node.append(onnx.helper.make_node("NoSuchOperator", [value], [f"x{index}"], name=f"strange{index}"))
    (tmp_path / "graphs").mkdir()
    shutil.copytree(digits_bundle, tmp_path / "b")
    onnx.save(model, str(tmp_path / "b" / "graphs" / "decoder.onnx"))
    with pytest.raises(BackendError) as caught:
        build_one(tmp_path / "b", "decoder", target, tmp_path / "x.engine")
    lines = str(caught.value).splitlines()
    assert "the decoder graph" in lines[0]
    assert f"does not parse: {len(lines) - 1} errors" in lines[0]
    assert "'strange1' (NoSuchOperator)" in lines[1]
    assert not (tmp_path / "x.engine").exists()
    (tmp_path / "b" / "graphs" / "decoder.onnx").write_bytes(b"no onnx")
    with pytest.raises(BackendError, match="the decoder graph"):
        build_one(tmp_path / "b", "decoder", target, tmp_path / "x.engine")


def test_a_profile_that_does_not_fit_the_graph(digits_bundle: Path, target: Target, tmp_path: Path) -> None:
    bundle = Bundle.load(digits_bundle)
    spec = graph_specs(bundle.architecture)["decoder"]
    graph = _graph(digits_bundle / "graphs" / "decoder.onnx")
    with pytest.raises(BackendError, match="the decoder engine"):
        build_graph(graph, spec, [{"B": (4, 2, 1)}], target, BuildSettings("fp32"), tmp_path / "x.engine", QUIET)
    assert not (tmp_path / "x.engine").exists()


class _Interfering(Reporter):
    """Does something at a phase's first step."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__(quiet=True)
        self._act = act
        self.seen: list[tuple[str, str | None]] = []

    @contextmanager
    def phases(self, name: str) -> Iterator[Phases]:
        outer = self

        class Watched(Phases):
            def start(self, name: str, parent: str | None = None, steps: int = 0) -> None:
                outer.seen.append((name, parent))

            def step(self, name: str, done: int) -> None:
                outer._act()

        yield Watched(None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_while_showing_progress_stops_the_build(
    digits_bundle: Path, target: Target, tmp_path: Path, error: type[BaseException]
) -> None:
    def act() -> None:
        raise error("at the first step")

    reporter = _Interfering(act)
    with pytest.raises(error):
        build_one(digits_bundle, "diffusion_step", target, tmp_path / "e" / "x.engine", reporter=reporter)
    assert not (tmp_path / "e").exists()
    assert ("parse", None) in reporter.seen
    # Only a build in the same process shows that the library has not been left in the middle of something.
    build_one(digits_bundle, "decoder", target, tmp_path / "x.engine")


def test_ctrl_c_cancels_and_the_handler_comes_back(digits_bundle: Path, target: Target, tmp_path: Path) -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    reporter = _Interfering(lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        build_one(digits_bundle, "diffusion_step", target, tmp_path / "x.engine", reporter=reporter)
    assert not (tmp_path / "x.engine").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert any(parent is not None for _, parent in reporter.seen), "phases nest"


def test_builds_outside_the_main_thread(digits_bundle: Path, target: Target, tmp_path: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(build_one(digits_bundle, "decoder", target, tmp_path / "x.engine"))
    )
    thread.start()
    thread.join()
    assert results
    assert (tmp_path / "x.engine").is_file()


def test_phases_nest_on_a_terminal_and_are_few_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with Reporter().phases("decoder engine") as phases:
            phases.start("Building engine", None, 2)
            phases.start("Timing tactics", "Building engine", 1)
            phases.step("Timing tactics", 1)
            phases.step("never started", 1)
            phases.finish("Timing tactics")
            phases.finish("never started")
            phases.step("Building engine", 1)

    work()
    assert capsys.readouterr().err == "decoder engine: Building engine ...\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    work()
    lines = capsys.readouterr().err
    assert "decoder engine" in lines
    assert "  Building engine" in lines


def test_tf32_is_off_where_a_graph_computes_in_fp32(
    digits_bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gtr_deploy.export.engines import graph as engine_graph

    flags: list[bool] = []

    def look(builder: Any, network: Any, config: Any) -> None:
        trt = target.trt
        flags.append(config.get_flag(trt.BuilderFlag.TF32))
        assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 500_000_000
        assert (config.max_aux_streams, config.builder_optimization_level) == (0, 1)
        assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
        assert config.num_compute_capabilities == 1
        assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION), "TensorRT-RTX lets nobody capture otherwise"

    monkeypatch.setattr(engine_graph, "_build", look)
    for kind in ("decoder", "detail_score", "merge_rows"):
        spec = graph_specs(Bundle.load(digits_bundle).architecture)[kind]
        path = digits_bundle / "graphs" / f"{kind}.onnx"
        for precision in ("fp32", "fp16", "int8"):
            settings, profile = BuildSettings(precision, 0.5, 1), contract_profile(spec)
            with pytest.raises(BackendError, match=f"cannot build the {kind} engine"):
                build_graph(_graph(path), spec, [profile], target, settings, path.with_name("never"), QUIET)
    assert flags == [False, True, True, *[False] * 6]


def test_an_inspector_that_sees_too_few_products_is_not_believed(
    build_digits: Callable[[str], Path], target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused ones are not listed as products; what is left may be the few that stay in float32."""
    monkeypatch.setattr("gtr_deploy.export.engines.graph._inspect", lambda *_: {"fp32": 1})
    built = build_one(build_digits("fp16"), "diffusion_step", replace(target, inspectable=True), tmp_path / "engine")
    assert built.audit.layers["fp16"] >= 7
    assert "the engine inspector shows 1 of" in built.audit.source


# TensorRT cannot be installed here. TensorRT-RTX under its name runs the same code, in a process of its own.
_AS_TENSORRT = """
import hashlib, sys, warnings
from pathlib import Path
import tensorrt_rtx
warnings.simplefilter("ignore")
sys.modules["tensorrt"] = tensorrt_rtx
from gtr_deploy.export.engines.graph import BuildSettings, build_graph
from gtr_deploy.export.engines.target import choose_target
from gtr_deploy.runtime.bundle.graph_file import GraphFile
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.models.families import graph_specs
from gtr_deploy.runtime.machine.examine import Gpu, Machine

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
machine = Machine("linux-x86_64", Gpu("Test GPU (8 GB)", "8.9", 1 << 33, "13.0"), "", {"tensorrt": "x"}, ())
target = choose_target("tensorrt", (), False, machine, "")
assert (target.compute_capabilities, target.gpu, target.build_gpu) == (("8.9",), machine.gpu.name, machine.gpu.name)
spec = graph_specs(Bundle.load(folder).architecture)["decoder"]
path = folder / "graphs" / "decoder.onnx"
graph = GraphFile(path, path.read_bytes())

def build(hardware_compatible=False):
    chosen = choose_target("tensorrt", (), hardware_compatible, machine, "")
    return build_graph(graph, spec, [{"B": (1, 1, 2)}], chosen, BuildSettings("fp32"), out, Reporter(quiet=True))

built = build()
assert not built.warnings, built.warnings
assert "engine inspector tells nothing" in built.audit.source
(cache,) = Path(sys.argv[3]).rglob("*.cache")
assert cache.name == f"tensorrt-{tensorrt_rtx.__version__}-Test-GPU-8-GB-.cache", cache
assert not [w for w in build().warnings if "ignored" in w]
for content in (b"", b"garbage", cache.read_bytes()[:-1]):
    cache.write_bytes(content)
    (warning,) = [w for w in build().warnings if "ignored" in w]
    assert "its checksum is wrong" in warning
    assert not [w for w in build().warnings if "ignored" in w], "written anew"
content = b"of another library"
cache.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\\n" + content)
build()
assert choose_target("tensorrt", (), True, machine, "").gpu is None
build(hardware_compatible=True)
other = choose_target("tensorrt-rtx", ("8.9",), False, machine, "")
try:
    build_graph(graph, spec, [{"B": (1, 1, 2)}], other, BuildSettings("fp32"), out, Reporter(quiet=True))
    raise AssertionError("the other flavour in one process")
except BackendError as error:
    assert "in a process of their own" in str(error)
print("done")
"""


def test_tensorrt_flavour_and_its_timing_cache(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GTR_DEPLOY_CACHE", str(tmp_path / "cache"))
    command = [
        sys.executable,
        "-c",
        _AS_TENSORRT,
        str(digits_bundle),
        str(tmp_path / "x.engine"),
        str(tmp_path / "cache"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "done", done.stderr


def test_without_polygraphy(
    digits_bundle: Path, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(BackendError, match=r"polygraphy is not installed; pip install 'gtr-deploy\[tensorrt-rtx\]'"):
        build_one(digits_bundle, "decoder", target, tmp_path / "x.engine")


def test_neither_torch_nor_onnx_is_imported() -> None:
    program = (
        "import sys, gtr_deploy.export.engines.builder; "
        "print(sorted({'torch', 'onnx', 'polygraphy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
