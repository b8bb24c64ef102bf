"""gtr-export engine, and engines in gtr-export build: caching, refusals, kills, and what is printed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from commands import one_line_error
from kinds import KINDS as GRAPH_KINDS
from msgspec import to_builtins

from gtr_deploy.export.build.build import build
from gtr_deploy.export.build.request import BuildRequest
from gtr_deploy.export.engines import builder as engines
from gtr_deploy.export.engines import target as engine_target
from gtr_deploy.export.engines.audit import Audit
from gtr_deploy.export.engines.builder import EngineRequest, EngineResult, build_engines
from gtr_deploy.export.engines.graph import BuildSettings, BuiltGraph
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import BackendError, GtrError, UsageError
from gtr_deploy.runtime.machine import examine as machine_module
from gtr_deploy.runtime.machine.examine import Gpu, Machine

trt = pytest.importorskip("tensorrt_rtx", reason="needs pip install 'gtr-deploy[tensorrt-rtx]'")

Cli = Callable[..., Result]
QUIET = Reporter(quiet=True)
KEY = f"tensorrt-rtx-{trt.__version__}-sm89"
KINDS = list(GRAPH_KINDS)
RTX = ("--engine", "tensorrt-rtx", "--compute-capability", "8.9")
VERSIONS = {"tensorrt": None, "tensorrt-rtx": trt.__version__, "onnxruntime": "x"}
NO_GPU = Machine("linux-x86_64", None, "no driver", VERSIONS, ())


def with_gpu(capability: str = "8.9", **versions: str) -> Machine:
    return Machine("linux-x86_64", Gpu("Test GPU", capability, 8 << 30, "13.0"), "", {**VERSIONS, **versions}, ())


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests say what machine this is."""
    monkeypatch.setattr(machine_module, "examine_machine", lambda: NO_GPU)


class Builder:
    """Takes the place of the real builder where what it writes does not matter."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, BuildSettings]] = []
        self.fail_at: str | None = None

    def __call__(self, onnx_file: Path, spec: Any, profiles: Any, target: Any, settings: Any, out: Path, _: Any) -> Any:
        if spec.kind == self.fail_at:
            raise BackendError(f"the {spec.kind} engine cannot be built")
        self.calls.append((spec.kind, settings))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(f"{spec.kind} {len(self.calls)}")
        products = spec.kind in ("backbone", "modulation", "diffusion_step", "detail_score")
        return BuiltGraph(0.1, Audit({"fp32": 9} if products else {}, "as parsed"), ())


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    fake = Builder()
    monkeypatch.setattr(engines, "build_graph", fake)
    return fake


def make(bundle: Path, machine: Machine = NO_GPU, **more: Any) -> EngineResult:
    chosen = {"flavour": "tensorrt-rtx", "compute_capabilities": ("8.9",), **more}
    return build_engines(EngineRequest(bundle, **chosen), QUIET, machine)


def test_the_whole_way(export_cli: Cli, own_bundle: Path) -> None:
    first = export_cli("engine", own_bundle, *RTX, "--max-batch", 1, "--optimization-level", 0)
    assert first.exit_code == 0, first.output
    assert f"MB of engines {KEY} (8 built, 0 cached" in first.stdout
    assert f"next: copy {own_bundle} to the GPU machine; there: gtr-run doctor bundle" in first.stdout
    assert "backbone: profile G=1..2 (2) B=1 V=" in first.stderr
    assert "backbone engine: Building engine ..." in first.stderr
    assert "50 fp32 matrix products (as parsed; not inspected: needs a GPU that runs the engine)" in first.stderr
    assert len(first.stderr.splitlines()) < 60
    bundle = Bundle.load(own_bundle)
    (listed,) = bundle.engine_sets
    assert (listed.key, listed.gpu, listed.max_batch, listed.plans) == (KEY, None, 1, ("gtr",))
    assert listed.graphs["backbone"].layers == {"fp32": 50}
    assert sorted(bundle.engine_paths(listed)) == sorted(KINDS)
    assert all(path == own_bundle / "engines" / KEY / f"{k}.engine" for k, path in bundle.engine_paths(listed).items())
    again = export_cli("engine", own_bundle, *RTX, "--max-batch", 1, "--optimization-level", 0, "--json")
    report = json.loads(again.stdout)
    assert (report["built"], report["cached"], report["warnings"]) == ([], KINDS, [])
    assert report["bytes"] == listed.bytes
    assert report["key"] == KEY
    shown = export_cli("inspect", own_bundle).stdout
    assert KEY in shown
    assert f"{listed.bytes / 1e6:.1f}" in shown


def test_only_what_changed_is_built_again(own_bundle: Path, builder: Builder) -> None:
    assert make(own_bundle).built == KINDS
    before = (own_bundle / "manifest.json").read_bytes()
    assert make(own_bundle).cached == KINDS
    assert (own_bundle / "manifest.json").read_bytes() == before
    (own_bundle / "engines" / KEY / "decoder.engine").write_text("damaged")
    assert make(own_bundle).built == ["decoder"]
    assert make(own_bundle, optimization_level=2).built == KINDS
    assert make(own_bundle, optimization_level=2, workspace_gb=1.0).built == KINDS
    assert make(own_bundle, optimization_level=2, workspace_gb=1.0).cached == KINDS
    smaller = make(own_bundle, optimization_level=2, workspace_gb=1.0, max_batch=2)
    assert smaller.built == KINDS
    assert Bundle.load(own_bundle).engine_sets == (smaller.engines,)
    assert make(own_bundle, optimization_level=2, workspace_gb=1.0, max_batch=2, force=True).built == KINDS
    Bundle.load(own_bundle).engine_paths(Bundle.load(own_bundle).engine_sets[0])
    assert [path.name for path in (own_bundle / "engines").iterdir()] == [KEY]
    settings = own_bundle / "engines" / KEY / "stages.json"
    settings.write_text("{")  # a damaged record only costs time
    assert make(own_bundle, optimization_level=2, workspace_gb=1.0, max_batch=2).built == KINDS


def test_sets_of_other_gpus_stay(own_bundle: Path, builder: Builder) -> None:
    make(own_bundle)
    other = make(own_bundle, compute_capabilities=("12.0", "8.6"))
    assert other.engines.compute_capabilities == ("8.6", "12.0")
    assert [entry.key[-10:] for entry in Bundle.load(own_bundle).engine_sets] == [KEY[-10:], "sm86-sm120"]
    make(own_bundle, force=True)
    assert [entry.key for entry in Bundle.load(own_bundle).engine_sets] == [other.engines.key, KEY]


def test_another_graph_is_built_again(own_bundle: Path, build_digits: Callable[[str], Path], builder: Builder) -> None:
    make(own_bundle)
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    with (own_bundle / "graphs" / "decoder.onnx").open("ab") as file:
        file.write(b"\x72\x00")  # an empty entry of metadata_props
    from gtr_deploy.runtime.bundle.manifest import StoredFile

    manifest["graphs"]["decoder"]["model"] = to_builtins(StoredFile.of(own_bundle, "graphs/decoder.onnx"))
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    assert make(own_bundle).built == ["decoder"]


def test_a_build_that_fails_resumes(own_bundle: Path, builder: Builder) -> None:
    make(own_bundle)
    before = (own_bundle / "manifest.json").read_bytes()
    builder.fail_at = "decoder"
    with pytest.raises(BackendError, match="decoder"):
        make(own_bundle, optimization_level=5)
    assert (own_bundle / "manifest.json").read_bytes() == before
    bundle = Bundle.load(own_bundle)
    bundle.engine_paths(bundle.engine_sets[0])
    builder.fail_at = None
    resumed = make(own_bundle, optimization_level=5)
    done = KINDS.index("decoder")
    assert resumed.cached == KINDS[:done]
    assert resumed.built == KINDS[done:]
    bundle = Bundle.load(own_bundle)
    bundle.engine_paths(bundle.engine_sets[0])
    assert [path.name for path in (own_bundle / "engines").iterdir()] == [KEY]


@pytest.mark.parametrize("cut", ["publish", "with_engines"])
def test_stopped_while_new_engines_take_their_place(
    own_bundle: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """At no moment are engines listed that are not whole, and nothing is built twice."""
    make(own_bundle)
    with monkeypatch.context() as patch:
        stop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
        patch.setattr(engines.StagedFolder if cut == "publish" else Bundle, cut, stop)
        with pytest.raises(KeyboardInterrupt):
            make(own_bundle, optimization_level=5)
    assert Bundle.load(own_bundle).engine_sets == ()
    assert make(own_bundle, optimization_level=5).cached == KINDS
    bundle = Bundle.load(own_bundle)
    bundle.engine_paths(bundle.engine_sets[0])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": 1, "engines": 2}', "null"])
def test_a_damaged_record_only_costs_time(own_bundle: Path, builder: Builder, content: str) -> None:
    builder.fail_at = "decoder"
    with pytest.raises(BackendError):
        make(own_bundle)
    (own_bundle / "engines" / f"{KEY}.partial" / "stages.json").write_text(content)
    builder.fail_at = None
    assert make(own_bundle).built == KINDS


@pytest.mark.parametrize(
    ("stop", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["Ctrl-C", "SIGTERM", "kill"],
)
def test_stopped_in_the_middle(own_bundle: Path, stop: signal.Signals, code: int) -> None:
    before = (own_bundle / "manifest.json").read_bytes()
    options = [*RTX, "--max-batch", "1", "--optimization-level", "0"]
    command = [sys.executable, "-u", "-m", "gtr_deploy.export.cli", "engine", str(own_bundle), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("diffusion_step engine: Building engine"):
            break
    time.sleep(0.2)
    process.send_signal(stop)
    rest = process.stderr.read()
    assert process.wait(60) == code, rest
    if stop != signal.SIGKILL:
        kept = "finished engines are kept; the same command goes on from there"
        assert rest.splitlines()[-1].endswith(f": stopped; {kept}")
        partial = own_bundle / "engines" / f"{KEY}.partial"
        assert sorted(path.name for path in partial.iterdir()) == [
            "backbone.engine",
            "modulation.engine",
            "stages.json",
        ]
    assert (own_bundle / "manifest.json").read_bytes() == before
    result = make(own_bundle, max_batch=1, optimization_level=0)
    assert result.cached == KINDS[:2]
    assert result.built == KINDS[2:]
    bundle = Bundle.load(own_bundle)
    bundle.engine_paths(bundle.engine_sets[0])


def test_two_builds_do_not_mix(own_bundle: Path, builder: Builder) -> None:
    from gtr_deploy.runtime.bundle.staged import lock

    with lock(own_bundle), pytest.raises(GtrError, match="another build is writing"):
        make(own_bundle)


def test_float32_under_another_name_is_noticed(export_cli: Cli, own_bundle: Path, builder: Builder) -> None:
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["precision"]["name"] = "fp16"
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    wrong = "9 of 9 matrix products run in fp32 although the bundle says fp16"
    one_line_error(export_cli("engine", own_bundle, *RTX, "--strict"), 1, f"the backbone engine: {wrong}")
    assert Bundle.load(own_bundle).engine_sets == ()
    result = export_cli("engine", own_bundle, *RTX)
    assert result.exit_code == 0
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    # Not detail_score: its contract is float32 in every bundle.
    assert warnings == [f"warning: {kind}: {wrong}" for kind in ("backbone", "modulation", "diffusion_step")]
    one_line_error(export_cli("engine", own_bundle, *RTX, "--strict"), 1, wrong)  # cached engines are judged as well


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--engine", "tensorrt"], 1, ["needs the GPU that will run them", "gtr-export engine", "on the target"]),
        (["--engine", "tensorrt", "--compute-capability", "8.9"], 2, ["--compute-capability is for tensorrt-rtx"]),
        (["--engine", "tensorrt-rtx", "--hardware-compatible"], 2, ["--hardware-compatible is for tensorrt"]),
        (["--engine", "tensorrt-rtx", "--compute-capability", "9.0"], 2, ["9.0, only for 7.5, 8.0, 8.6, 8.9, 12.0"]),
        (["--engine", "tensorrt-rtx", "--compute-capability", "8.9,"], 2, ["--compute-capability"]),
        (["--engine", "openvino"], 2, ["--engine"]),
        ([], 2, ["--engine"]),
        ([*RTX, "--plans", "gtr,nope"], 2, ["plan 'nope' is not one of"]),
        ([*RTX, "--plans", "none.json"], 1, ["none.json is missing"]),
        ([*RTX, "--max-batch", "9"], 2, ["--max-batch 9: the bundle promises 8"]),
        ([*RTX, "--workspace", "0"], 2, ["--workspace"]),
        ([*RTX, "--optimization-level", "6"], 2, ["--optimization-level"]),
    ],
)
def test_refusals(export_cli: Cli, digits_bundle: Path, options: list[str], code: int, words: list[str]) -> None:
    one_line_error(export_cli("engine", digits_bundle, *options), code, *words)
    assert not (digits_bundle / "engines").exists()


@pytest.mark.parametrize(
    "more", [{"optimization_level": 9}, {"workspace_gb": 0.0}, {"max_batch": 0}, {"plans": ()}, {"flavour": "x"}]
)
def test_refusals_of_the_function(digits_bundle: Path, more: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError):
        make(digits_bundle, **more)


def test_default_compute_capabilities(own_bundle: Path, builder: Builder) -> None:
    found = [
        make(own_bundle, machine, compute_capabilities=()).engines.compute_capabilities
        for machine in (NO_GPU, with_gpu("12.0"), with_gpu("9.0"))
    ]
    assert found == [("8.6", "8.9", "12.0"), ("12.0",), ("8.6", "8.9", "12.0")]


def test_plans_from_files(export_cli: Cli, run_cli: Cli, own_bundle: Path, tmp_path: Path, builder: Builder) -> None:
    path = tmp_path / "mine.json"
    path.write_text(run_cli("plan", own_bundle, "--stage-steps", "4,2,1", "--json").stdout)
    result = export_cli("engine", own_bundle, *RTX, "--plans", f"gtr,{path}")
    assert result.exit_code == 0, result.output
    assert Bundle.load(own_bundle).engine_sets[0].plans == ("gtr", "mine.json")
    path.write_text("[]")
    one_line_error(export_cli("engine", own_bundle, *RTX, "--plans", path), 2, "has no plan settings")


def test_graphs_that_no_plan_uses_get_engines_too(own_bundle: Path, builder: Builder) -> None:
    result = make(own_bundle, plans=("mar",))
    assert result.built == KINDS
    (profile,) = result.engines.graphs["select_rows"].profiles
    assert profile["B"] == (1, 2, 8)


def test_tensorrt_is_bound_to_its_gpu(own_bundle: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_target, "load_library", lambda flavour: trt)
    more = {"flavour": "tensorrt", "compute_capabilities": ()}
    bound = make(own_bundle, with_gpu("9.0"), **more).engines
    assert (bound.gpu, bound.compute_capabilities, bound.hardware_compatible) == ("Test GPU", ("9.0",), False)
    free = make(own_bundle, with_gpu("9.0"), hardware_compatible=True, **more)
    assert (free.engines.gpu, free.engines.hardware_compatible, free.built) == (None, True, KINDS)
    assert "verify" in free.warnings[0]
    assert "--backend tensorrt` there first" in free.warnings[0]


class TestBuild:
    """gtr-export build --engine."""

    def build(self, cli: Cli, bundle: Path, *options: str) -> Result:
        return cli("build", "--model", "mar-digits", "--out", bundle, *options)

    def test_without_gpu_auto_means_onnxruntime(self, export_cli: Cli, own_bundle: Path) -> None:
        result = self.build(export_cli, own_bundle)
        assert "engine: onnxruntime (no GPU (no driver)), precision: fp32" in result.stderr
        assert "is up to date" in result.stdout
        assert "--plans not used" in self.build(export_cli, own_bundle, "--plans", "mar").stderr
        one_line_error(self.build(export_cli, own_bundle, "--engine", "onnxruntime", "--strict"), 2, "--strict")

    def test_engines_ahead_of_time(self, export_cli: Cli, own_bundle: Path, builder: Builder) -> None:
        options = (*RTX, "--precision", "fp32", "--plans", "gtr,mar", "--json")
        report = json.loads(self.build(export_cli, own_bundle, *options).stdout)
        assert report["engines"]["built"] == KINDS
        assert report["engines"]["plans"] == ["gtr", "mar"]
        assert report["next"].startswith(f"copy {own_bundle} to the GPU machine")
        assert "is up to date" in self.build(export_cli, own_bundle, *options[:-1]).stdout

    def test_tensorrt_without_gpu_keeps_the_bundle(
        self, export_cli: Cli, build_digits: Callable[[str], Path], tmp_path: Path
    ) -> None:
        bundle = Path(shutil.copytree(build_digits("fp16"), tmp_path / "b"))
        result = self.build(export_cli, bundle, "--engine", "tensorrt")
        one_line_error(
            result, 1, f"{bundle} is complete", f"`gtr-export engine {bundle} --engine tensorrt` on the target"
        )
        assert "precision: fp16" in result.stderr

    def test_engine_options_are_checked_before_the_long_part(self, export_cli: Cli, tmp_path: Path) -> None:
        for options, word in ((("--compute-capability", "9.0"), "9.0"), ((*RTX[2:], "--plans", "nope"), "nope")):
            result = self.build(export_cli, tmp_path / "b", "--engine", "tensorrt-rtx", *options)
            one_line_error(result, 2, word)
        assert not (tmp_path / "b").exists()

    def test_unchanged_graphs_keep_their_engines(self, own_bundle: Path, builder: Builder) -> None:
        made = make(own_bundle)
        build(BuildRequest("mar-digits", own_bundle, max_batch=16), QUIET)
        bundle = Bundle.load(own_bundle)
        assert (bundle.max_batch, bundle.engine_sets) == (16, (made.engines,))
        bundle.engine_paths(made.engines)
        assert make(own_bundle, max_batch=8).cached == KINDS
        build(BuildRequest("mar-digits", own_bundle, random_weights=True), QUIET)
        assert Bundle.load(own_bundle).engine_sets == ()
        assert not (own_bundle / "engines").exists()

    @pytest.mark.parametrize(
        ("machine", "chosen", "reason"),
        [
            (NO_GPU, "onnxruntime", "no driver"),
            (with_gpu(tensorrt="11.4"), "tensorrt", "TensorRT 11.4 and Test GPU"),
            (with_gpu("12.0"), "tensorrt-rtx", "compute capability 12.0"),
            (with_gpu("9.0"), "onnxruntime", "TensorRT-RTX does not support"),
            (with_gpu(**{"tensorrt-rtx": None}), "onnxruntime", "neither TensorRT nor TensorRT-RTX"),  # type: ignore[arg-type]
        ],
    )
    def test_auto(self, machine: Machine, chosen: str, reason: str) -> None:
        engine, why = engine_target.choose_engine(machine)
        assert engine == chosen
        assert reason in why
