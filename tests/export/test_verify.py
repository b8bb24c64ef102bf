"""The rungs: a sound bundle climbs them, and each kind of fault stops at its own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from msgspec import to_builtins
from onnx import numpy_helper

from gtr_deploy.export.verify import verify as verify_module
from gtr_deploy.export.verify.report import Check, Report
from gtr_deploy.export.verify.verify import relative_error, verify
from gtr_deploy.runtime.bundle.manifest import StoredFile
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import BundleError, GtrError, PlanError
from gtr_deploy.runtime.files import write_json
from gtr_deploy.runtime.sampling.plan import PRESETS

Cli = Callable[..., Result]
QUIET = Reporter(quiet=True)


def _rewrite(bundle: Path, kind: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Changes a graph and makes the manifest agree, as a fault in the exporter would."""
    path = bundle / "graphs" / f"{kind}.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["graphs"][kind]["model"] = to_builtins(StoredFile.of(bundle, f"graphs/{kind}.onnx"))
    write_json(bundle / "manifest.json", manifest)


def _scale_a_weight(model: onnx.ModelProto, factor: float) -> None:
    weight = max(model.graph.initializer, key=lambda i: len(i.raw_data))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))


def _statuses(report: Report) -> dict[str, set[str]]:
    return {rung: {c.status for c in report.checks if c.rung == rung} for rung in verify_module.RUNGS}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_sound_bundle_reaches_the_top(
    build_digits: Callable[[str], Path], tmp_path: Path, precision: str, export_cli: Cli
) -> None:
    bundle = Path(shutil.copytree(build_digits(precision), tmp_path / "bundle"))
    plans = None if precision == "fp32" else "gtr-fast"
    result = export_cli("verify", bundle, "--images", 1, *(["--plans", plans] if plans else []))
    assert result.exit_code == 0, result.output
    assert "rung reached: images" in result.stdout
    report = Bundle.load(bundle).read_report("parity")
    assert report["rung_reached"] == "images"
    assert report["precision"] == precision
    assert {c["status"] for c in report["checks"]} == {"ok"}
    images = [c for c in report["checks"] if c["rung"] == "images"]
    assert len(images) == (len(PRESETS) if plans is None else 2)  # half precision: against itself and against fp32
    assert all(c["value"] <= c["tolerance"] for c in images)
    assert "rung reached: images" in export_cli("inspect", bundle).stdout


@pytest.mark.parametrize(("precision", "evaluated"), [("fp16", "openvino cpu"), ("bf16", "openvino cpu, b")])
def test_openvino_is_checked_like_onnx_runtime(
    build_digits: Callable[[str], Path], tmp_path: Path, precision: str, evaluated: str, export_cli: Cli
) -> None:
    bundle = Path(shutil.copytree(build_digits(precision), tmp_path / "bundle"))
    result = export_cli("verify", bundle, "--images", 1, "--plans", "gtr-fast", "--backend", "openvino")
    assert result.exit_code == 0, result.output
    report = Bundle.load(bundle).read_report("parity-openvino")
    assert report["rung_reached"] == "images"
    assert report["evaluated_with"].startswith(evaluated)
    _rewrite(bundle, "diffusion_step", lambda model: model.graph.node.pop())
    broken = verify(bundle, QUIET, engine="openvino")
    assert broken.reached == "none"
    assert next(check for check in broken.checks if check.status == "failed").rung == "loads"


def test_a_bundle_that_does_not_load(own_bundle: Path) -> None:
    (own_bundle / "graphs" / "decoder.onnx").write_bytes(b"x")
    report = verify(own_bundle, QUIET)
    assert report.reached == "none"
    assert report.failed
    assert "decoder.onnx has 1 bytes" in report.checks[0].note
    assert [c.status for c in report.checks] == ["failed", "skipped", "skipped", "skipped"]


def test_values_that_are_not_finite(own_bundle: Path, export_cli: Cli) -> None:
    _rewrite(own_bundle, "backbone", lambda model: _scale_a_weight(model, np.inf))
    result = export_cli("verify", own_bundle, "--plans", "gtr-fast")
    assert result.exit_code == 1
    report = Bundle.load(own_bundle).read_report("parity")
    assert report["rung_reached"] == "loads"
    notes = [c["note"] for c in report["checks"] if c["rung"] == "finite" and c["status"] == "failed"]
    assert len(notes) == 3
    assert all("of z are not finite" in note for note in notes)
    assert "FAILED" in result.stdout


def test_a_graph_that_computes_something_else(own_bundle: Path) -> None:
    _rewrite(own_bundle, "diffusion_step", lambda model: _scale_a_weight(model, 1.01))
    report = verify(own_bundle, QUIET, plans=["gtr-fast"])
    assert report.reached == "finite"
    failed = [c for c in report.checks if c.status == "failed"]
    assert {c.subject.split(",")[0] for c in failed if c.rung == "graphs"} == {"diffusion_step"}
    assert {c.rung for c in failed} == {"graphs"}
    assert [c.note for c in report.checks if c.rung == "images"] == ["a rung below it failed"]


def test_a_graph_with_another_shape(own_bundle: Path) -> None:
    def transpose(model: onnx.ModelProto) -> None:
        """What it declares is right, what it gives is not."""
        for node in model.graph.node:
            node.output[:] = ["straight" if name == "score" else name for name in node.output]
        model.graph.node.append(onnx.helper.make_node("Transpose", ["straight"], ["score"], perm=[1, 0]))

    _rewrite(own_bundle, "detail_score", transpose)
    report = verify(own_bundle, QUIET, plans=["gtr-fast"])
    assert any("expected (2, 8)" in c.note for c in report.checks if c.rung == "finite")


def test_without_the_checkpoint_the_lower_rungs_are_climbed(
    own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def refuse(path: Path, *rest: Any, **named: Any) -> Any:
        assert path.name != "other.pth"
        return real(path, *rest, **named)

    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["source"]["checkpoint"] |= {"path": str(tmp_path / "gone.pth"), "sha256": "0" * 64}
    manifest["model"]["name"] = "mar-own"
    write_json(own_bundle / "manifest.json", manifest)
    report = verify(own_bundle, QUIET)
    assert report.reached == "finite"
    assert not report.failed
    assert _statuses(report)["graphs"] == {"skipped"}
    assert any("give it with --checkpoint" in c.note for c in report.checks)
    other = tmp_path / "other.pth"
    other.write_bytes(b"x")
    with pytest.raises(GtrError, match="the bundle was built from 000000000000"):
        verify(own_bundle, QUIET, checkpoint=other)
    manifest["source"]["checkpoint"]["path"] = str(other)
    write_json(own_bundle / "manifest.json", manifest)
    monkeypatch.setattr(Path, "open", refuse)  # what a manifest names is not opened
    assert "is not known here; give it with --checkpoint" in verify(own_bundle, QUIET).checks[-1].note


def test_on_a_deployment_machine_without_torch(
    own_bundle: Path, build_digits: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    report = verify(own_bundle, QUIET)
    assert report.reached == "finite"
    assert not report.failed
    assert "torch is not installed" in report.checks[-1].note
    monkeypatch.setitem(sys.modules, "gtr_deploy.export.graphs.bfloat16", None)
    half = Path(shutil.copytree(build_digits("bf16"), tmp_path / "bf16"))
    report = verify(half, QUIET)
    assert report.reached == "none"
    assert "pip install 'gtr-deploy[export]'" in report.checks[0].note


def test_random_weights_are_made_again(tmp_path: Path) -> None:
    from gtr_deploy.export.build.build import build
    from gtr_deploy.export.build.request import BuildRequest

    build(BuildRequest("mar-digits", tmp_path / "b", random_weights=True), QUIET)
    report = verify(tmp_path / "b", QUIET, plans=["gtr-fast"], images=1)
    assert report.reached == "images"


def test_big_generations_are_skipped_unless_named(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, export_cli: Cli
) -> None:
    monkeypatch.setattr(verify_module, "CPU_BUDGET", 0.0)
    report = verify(own_bundle, QUIET)
    assert report.reached == "graphs"
    assert not report.failed
    assert _statuses(report)["images"] == {"skipped"}
    result = export_cli("verify", own_bundle, "--plans", "gtr-fast", "--images", "1", "--json")
    assert json.loads(result.stdout)["rung_reached"] == "images"


def test_not_a_bundle_and_unknown_plan(tmp_path: Path, own_bundle: Path, export_cli: Cli) -> None:
    with pytest.raises(BundleError):
        verify(tmp_path / "nothing", QUIET)
    with pytest.raises(PlanError, match="'best' is not one of"):
        verify(own_bundle, QUIET, plans=["best"])
    assert export_cli("verify", own_bundle, "--plans", "best").exit_code == 2


def test_relative_error() -> None:
    one = np.array([3.0, 4.0], np.float32)
    assert relative_error(one, one) == 0
    assert relative_error(one * 1.1, one) == pytest.approx(0.1, rel=1e-5)
    assert relative_error(one, one * 0) == float("inf")
    assert relative_error(one * 0, one * 0) == 0
    assert relative_error(one * np.nan, one) == float("inf")
    assert relative_error(np.array([255], np.uint8), np.array([0], np.uint8)) == float("inf")
    assert relative_error(np.array([0], np.uint8), np.array([200], np.uint8)) == 1


@pytest.mark.parametrize(
    ("states", "reached"),
    [
        ([], "none"),
        ([("loads", "failed")], "none"),
        ([("loads", "ok"), ("finite", "failed"), ("graphs", "ok")], "loads"),
        ([("loads", "ok"), ("finite", "ok"), ("graphs", "ok"), ("images", "failed")], "graphs"),
        ([("loads", "ok"), ("finite", "ok"), ("graphs", "skipped")], "finite"),
        ([("loads", "ok"), ("finite", "ok"), ("graphs", "ok"), ("images", "ok"), ("images", "skipped")], "images"),
    ],
)
def test_no_claim_above_its_rung(states: list[tuple[str, str]], reached: str) -> None:
    report = Report("m", "fp32", "x", [Check(rung, "s", status) for rung, status in states])
    assert report.reached == reached


def test_a_report_that_cannot_be_kept_costs_only_itself(own_bundle: Path, export_cli: Callable[..., Result]) -> None:
    (own_bundle / "reports").write_text("a file where a folder should be")
    arguments = ["verify", own_bundle, "--plans", "gtr-fast", "--images", 1]
    result = export_cli(*arguments)
    assert result.exit_code == 0, result.output
    assert "rung reached: images" in result.stdout
    assert "written to" not in result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("gtr-export verify: the report is not kept in the bundle: ")
    assert str(own_bundle / "reports") in last
    assert Bundle.load(own_bundle).read_report("parity") is None
    told = export_cli(*arguments, "--json")
    assert json.loads(told.stdout)["rung_reached"] == "images"
    assert "is not kept" in told.stderr


def test_a_failed_check_decides_whatever_becomes_of_the_report(
    own_bundle: Path, export_cli: Callable[..., Result]
) -> None:
    (own_bundle / "reports").symlink_to("/")
    graph = own_bundle / "graphs" / "decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    result = export_cli("verify", own_bundle)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "'reports' leads outside the bundle" in result.stderr
