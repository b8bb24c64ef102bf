"""int8 and fp8 bundles: made, cached, resumed, run with the right flavour, refused when senseless."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gtr_deploy.calibration import bundle as calibration_bundle
from gtr_deploy.calibration.bundle import CalibrationRequest, quantise_bundle
from gtr_deploy.export.build import BuildRequest, CalibrationChoices, build
from gtr_deploy.export.verify import verify
from gtr_deploy.runtime.backends import BackendOptions, open_backend, resolve_backend
from gtr_deploy.runtime.bundle import MANIFEST, Bundle
from gtr_deploy.runtime.console import Reporter
from gtr_deploy.runtime.errors import BundleError, GtrError, UsageError
from gtr_deploy.runtime.pipeline import Pipeline

QUIET = Reporter(quiet=True)
SMALL = {"images": 4, "plan": "gtr-fast", "compared": 2, "threads": 1}


@pytest.fixture(scope="module")
def int8(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "digits-int8"
    assert quantise_bundle(CalibrationRequest(digits_bundle, out, **SMALL), QUIET).state == "built"
    return out


@pytest.fixture(scope="module")
def fp8(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8") / "digits-fp8"
    quantise_bundle(CalibrationRequest(digits_bundle, out, "fp8", **SMALL), QUIET)
    return out


def _latents(folder: Path) -> np.ndarray:
    pipeline = Pipeline.load(Bundle.load(folder), "onnxruntime", 1, True, "cpu")
    return pipeline.generate([3, 7], plan="gtr-fast", batch_size=2).latents


def test_int8_holds_both_flavours_and_the_cpu_runs_its_own(int8: Path, digits_bundle: Path) -> None:
    bundle = Bundle.load(int8)
    engines, cpu = bundle.graph_paths(), bundle.graph_paths(target="cpu")
    assert engines["backbone"].parent.name == "graphs"
    assert cpu["backbone"].parent.name == "cpu"
    assert cpu["decoder"] == engines["decoder"]
    wanted = _latents(digits_bundle)
    assert 0.002 < np.linalg.norm(_latents(int8) - wanted) / np.linalg.norm(wanted) < 0.08
    report = bundle.read_report("calibration")
    assert set(report["flavours"]) == {"tensorrt", "cpu"}
    for found in report["flavours"].values():
        assert found["median_image_error"] < found["gate"]
        assert found["share_of_multiplications"]["backbone"] == 1.0
        assert found["errors"]["z"] < 0.03
    assert not (int8 / "statistics.npz").exists()


def test_nothing_to_do_ends_at_once(int8: Path, digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_bundle, "collect", lambda *_: pytest.fail("calibrated again"))
    assert quantise_bundle(CalibrationRequest(digits_bundle, int8, **SMALL), QUIET).state == "cached"


def test_a_stopped_run_goes_on_with_its_statistics(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = CalibrationRequest(digits_bundle, tmp_path / "out", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(calibration_bundle, "record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantise_bundle(request, QUIET)
    assert not request.out.exists()
    with pytest.raises(BundleError, match="did not finish"):
        Bundle.load(tmp_path / "out.partial")
    seen: list[int] = []
    collect = calibration_bundle.collect

    def counting(*arguments):
        result = collect(*arguments)
        seen.append(result.resumed)
        return result

    monkeypatch.setattr(calibration_bundle, "collect", counting)
    assert quantise_bundle(request, QUIET).state == "built"
    assert seen == [4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_fp8_on_a_cpu_is_an_evaluation_and_says_so(fp8: Path, digits_bundle: Path) -> None:
    bundle = Bundle.load(fp8)
    _, why = resolve_backend(bundle, BackendOptions("onnxruntime", "cpu"))
    assert why is not None
    assert "not a deployment" in why
    assert open_backend(bundle, BackendOptions("onnxruntime", "cpu", threads=1)).name == "onnxruntime"
    wanted = _latents(digits_bundle)
    assert 0.01 < np.linalg.norm(_latents(fp8) - wanted) / np.linalg.norm(wanted) < 0.16


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_verify_compares_with_float32(precision: str, int8: Path, fp8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree({"int8": int8, "fp8": fp8}[precision], tmp_path / "bundle"))
    report = verify(folder, QUIET, plans=["gtr-fast"])
    assert report.reached == "images", [check for check in report.checks if check.status == "failed"]
    assert not any(precision in check.subject for check in report.checks)


def test_build_from_weights(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    choices = CalibrationChoices(images=2, plan="gtr-fast", keep=1, threads=1)
    request = BuildRequest("mar-digits", out, precision="int8", calibration=choices)
    result = build(request, QUIET)
    assert result.stages["calibration"] == "built"
    assert Bundle.load(out).precision == "int8"
    assert len(Bundle.load(out).read_report("calibration")["flavours"]["cpu"]["kept"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".digits.lock", "digits"]
    assert build(request, QUIET).unchanged


def test_damaged_cpu_graphs_are_found(int8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8, tmp_path / "bundle"))
    path = folder / "graphs" / "cpu" / "backbone.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    Bundle.load(folder).graph_paths()
    with pytest.raises(BundleError, match="cpu/backbone"):
        Bundle.load(folder).graph_paths(target="cpu")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["graphs"]["backbone"]["cpu"] = {"model": None}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match="exactly model and data"):
        Bundle.load(folder)


def test_bad_requests_are_one_line(int8: Path, digits_bundle: Path, build_digits, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for change, message in (
        ({"source": int8}, "quantised already"),
        ({"source": build_digits("fp16")}, "starts from an fp32 bundle"),
        ({"out": digits_bundle}, "is the source itself"),
        ({"precision": "fp16"}, "not one of int8, fp8"),
        ({"images": 0}, "give at least 1"),
        ({"compared": 0}, "give at least 1"),
        ({"method": "median"}, "is not one of max"),
        ({"precision": "fp8", "method": "mse"}, "for integers"),
        ({"labels": [10]}, "class 10"),
        ({"plan": "nope"}, "plan 'nope'"),
    ):
        arguments = {"source": digits_bundle, "out": out, **SMALL, **change}
        with pytest.raises(UsageError, match=message) as raised:
            quantise_bundle(CalibrationRequest(**arguments), QUIET)
        assert "\n" not in str(raised.value)
    out.mkdir()
    (out / "letter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(GtrError, match="in the way"):
        quantise_bundle(CalibrationRequest(digits_bundle, out, **SMALL), QUIET)
    with pytest.raises(GtrError, match="holds mar-digits int8, this one is mar-digits fp8"):
        quantise_bundle(CalibrationRequest(digits_bundle, int8, "fp8", **SMALL), QUIET)


def test_commands(export_cli, digits_bundle: Path, tmp_path: Path) -> None:
    few = ("--calibration-images", "2", "--calibration-plan", "gtr-fast", "--compared-images", "1", "--threads", "1")
    result = export_cli("calibrate", digits_bundle, "--out", tmp_path / "b", *few)
    assert result.exit_code == 0, result.stderr
    assert "head.final_layer.linear" in result.stdout
    assert "gtr-export verify" in result.stdout
    again = export_cli("calibrate", digits_bundle, "--out", tmp_path / "b", "--json", *few)
    assert json.loads(again.stdout)["state"] == "cached"
    plot = tmp_path / "plot.png"
    shown = export_cli("sensitivity", digits_bundle, "--flavour", "cpu", "--json", "--plot", plot, *few)
    assert shown.exit_code == 0, shown.stderr
    assert len(json.loads(shown.stdout)["layers"]) == 47
    assert plot.is_file()
    for arguments, message in (
        (("calibrate", digits_bundle, "--keep", "most"), "neither auto nor a number"),
        (("build", "--model", "mar-digits", "--engine", "onnxruntime", "--keep", "2"), "is not calibrated"),
        (("sensitivity", digits_bundle, "--plot", "x.jpg"), "does not end in .png"),
    ):
        refused = export_cli(*arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
