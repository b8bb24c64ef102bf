"""int8 and fp8 bundles: made, cached, resumed, run with the right flavour, refused when senseless."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec import to_builtins

from gtr_deploy.calibration import quantised_bundle as calibration_bundle
from gtr_deploy.calibration.collect import STAGE_VERSIONS
from gtr_deploy.calibration.data import calibration_images
from gtr_deploy.calibration.quantised_bundle import calibration_key, quantise_bundle
from gtr_deploy.calibration.request import CalibrationRequest
from gtr_deploy.export.build.build import build
from gtr_deploy.export.build.request import BuildRequest, CalibrationChoices
from gtr_deploy.export.verify.limits import graph_limit
from gtr_deploy.export.verify.verify import verify
from gtr_deploy.runtime.backends.choice import open_backend, resolve_backend
from gtr_deploy.runtime.backends.row import BackendOptions
from gtr_deploy.runtime.bundle.manifest import MANIFEST, GraphFiles
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import BundleError, GtrError, UsageError
from gtr_deploy.runtime.models.families import graph_specs
from gtr_deploy.runtime.pipeline import Pipeline

QUIET = Reporter(quiet=True)
SMALL = {"images": 4, "plan": "gtr-fast", "compared": 2, "threads": 1}


@pytest.fixture(scope="module")
def int8_request(digits_bundle: Path, build_digits, tmp_path_factory: pytest.TempPathFactory) -> CalibrationRequest:
    folder = tmp_path_factory.mktemp("int8")
    half = Path(shutil.copytree(build_digits("fp16"), folder / "fp16"))
    # This model's decoder computes nothing and is the same in both precisions; a VAE's is not.
    model = onnx.load(half / "graphs" / "decoder.onnx")
    model.doc_string = "fp16's own"
    onnx.save(model, half / "graphs" / "decoder.onnx")
    manifest = json.loads((half / MANIFEST).read_text(encoding="utf-8"))
    manifest["graphs"]["decoder"].update(to_builtins(GraphFiles.of(half, "graphs/decoder.onnx")))
    (half / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return CalibrationRequest(digits_bundle, folder / "digits-int8", float16=half, **SMALL)


@pytest.fixture(scope="module")
def int8(int8_request: CalibrationRequest) -> Path:
    assert quantise_bundle(int8_request, QUIET).state == "built"
    return int8_request.out


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
    assert cpu["detail_score"] == engines["detail_score"]  # the same file in both sources
    assert onnx.load(engines["decoder"]).doc_string == "fp16's own"
    assert onnx.load(cpu["decoder"]).doc_string != "fp16's own"
    wanted = _latents(digits_bundle)
    assert 0.002 < np.linalg.norm(_latents(int8) - wanted) / np.linalg.norm(wanted) < 0.08
    report = bundle.read_report("calibration")
    assert set(report["flavours"]) == {"tensorrt", "cpu"}
    for found in report["flavours"].values():
        assert found["median_image_error"] < found["gate"]
        assert found["share_of_multiplications"]["backbone"] == 1.0
        assert found["errors"]["z"] < 0.03
    assert not (int8 / "statistics.npz").exists()


def test_what_gpus_do_not_quantise_is_float16(int8: Path, fp8: Path) -> None:
    """Attention products are the ones without a Q/DQ pair in front; in float32 they are several times slower."""
    for folder, element in ((int8, onnx.TensorProto.FLOAT16), (fp8, onnx.TensorProto.FLOAT)):
        model = onnx.shape_inference.infer_shapes(onnx.load(folder / "graphs" / "backbone.onnx"))
        kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        made = {output: node for node in model.graph.node for output in node.output}
        attention = [
            node
            for node in model.graph.node
            if node.op_type == "MatMul" and all(name in made for name in node.input)
            if not any(made[name].op_type == "DequantizeLinear" for name in node.input)
        ]
        assert len(attention) == 16
        assert {kinds[node.output[0]] for node in attention} == {element}
    assert Bundle.load(int8).read_report("calibration")["rest"] == "fp16"
    assert "attention products" in Bundle.load(int8).manifest.precision.float16


def test_nothing_to_do_ends_at_once(
    int8: Path, int8_request: CalibrationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_bundle, "collect", lambda *_: pytest.fail("calibrated again"))
    assert quantise_bundle(int8_request, QUIET).state == "cached"


@pytest.mark.parametrize("stage", ["sampler", "plan", "noise", "statistics", "ranges", "quantise"])
def test_the_key_follows_versions_not_source_files(
    int8_request: CalibrationRequest, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """What draws (plot.py) has no version: editing it throws nothing away."""
    source = Bundle.load(int8_request.source)
    images = calibration_images(source.architecture, source.conditioner, 4)
    before = calibration_key(int8_request, [{"backbone": "x"}], images, 8)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"the key reads {path}"))
    assert calibration_key(int8_request, [{"backbone": "x"}], images, 8) == before
    monkeypatch.setitem(STAGE_VERSIONS, stage, 99)
    assert calibration_key(int8_request, [{"backbone": "x"}], images, 8) != before


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


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


def test_verification_takes_the_calibrations_word_for_z(int8: Path, tmp_path: Path) -> None:
    """Deeper models lose more than mar-digits; but a report that says too much, or is not sound, changes nothing."""
    folder = Path(shutil.copytree(int8, tmp_path / "bundle"))
    report, specs = Bundle.load(folder).read_report("calibration"), graph_specs(Bundle.load(folder).architecture)

    def limit(value: Any, engine: str = "onnxruntime", kind: str = "backbone") -> tuple[float, str]:
        Bundle.load(folder).write_report("calibration", value)
        return graph_limit(specs[kind], Bundle.load(folder), "fp32", engine)

    def measured(z: Any, images: float = 0.02) -> dict[str, Any]:
        changed = copy.deepcopy(report)
        changed["flavours"]["cpu"] |= {"errors": {"z": z}, "median_image_error": images}
        return changed

    fixed = (specs["backbone"].against_fp32["int8"], "")
    assert limit(report) == fixed
    assert limit(measured(0.06)) == (pytest.approx(0.09), "calibration measured 0.06")
    assert limit(measured(0.06), engine="openvino") == (pytest.approx(0.09), "calibration measured 0.06")
    assert limit(measured(0.06), engine="tensorrt-rtx") == fixed
    assert limit(measured(0.06), kind="diffusion_step") == (specs["diffusion_step"].against_fp32["int8"], "")
    assert limit(measured(0.9))[0] == 0.25
    for unsound in (measured(0.06, images=0.5), measured(0.06, images=float("nan")), measured("x"), {}, []):
        assert limit(unsound) == fixed
    Bundle.load(folder).write_report("calibration", measured(0.06))
    (folder / "reports" / "calibration.json").write_text("{}", encoding="utf-8")
    assert graph_limit(specs["backbone"], Bundle.load(folder), "fp32", "onnxruntime") == fixed


def test_build_from_weights(digits_bundle: Path, build_digits, tmp_path: Path) -> None:
    """Stopped after its float graphs were finished, which lie beside the wanted bundle; they are not exported again."""
    out = tmp_path / "digits"
    shutil.copytree(digits_bundle, tmp_path / ".digits.gtr-fp32")
    shutil.copytree(build_digits("fp16"), tmp_path / ".digits.gtr-fp16")
    choices = CalibrationChoices(images=2, plan="gtr-fast", threads=1)
    request = BuildRequest("mar-digits", out, precision="int8", calibration=choices)
    result = build(request, QUIET)
    assert (result.stages["backbone"], result.stages["calibration"]) == ("cached", "built")
    assert Bundle.load(out).precision == "int8"
    report = Bundle.load(out).read_report("calibration")
    assert report["flavours"]["cpu"]["kept"] == ["head.final_layer.linear"]
    assert report["rest"] == "fp16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits"]
    assert build(request, QUIET).unchanged
    names = tmp_path / "names"
    names.write_text("\n".join(f"figure {index}" for index in range(10)))
    assert build(replace(request, class_names=names), QUIET).unchanged  # no graph, and no calibration again
    assert Bundle.load(out).conditioner.summary == "10 classes, figure 0 to figure 9"
    assert Bundle.load(out).read_report("calibration") == report


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
    with pytest.raises(BundleError, match=r"graphs.backbone.cpu.model: Expected `object`, got `null`"):
        Bundle.load(folder)


def _changed(folder: Path, target: Path, **changes) -> Path:
    """A bundle's manifest alone, changed."""
    target.mkdir()
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, value in changes.items():
        manifest[name] = {**manifest[name], **value} if isinstance(value, dict) else value
    (target / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return target


def test_bad_requests_are_one_line(int8: Path, digits_bundle: Path, build_digits, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for change, message in (
        ({"source": int8}, "quantised already"),
        ({"source": build_digits("fp16")}, "starts from an fp32 bundle"),
        ({"float16": digits_bundle}, "is fp32; --float16 takes an fp16 bundle"),
        ({"float16": _changed(build_digits("fp16"), tmp_path / "a", max_batch=1)}, "for batches up to 1"),
        ({"float16": _changed(build_digits("fp16"), tmp_path / "b", source={"random_weights": 7})}, "other weights"),
        ({"out": digits_bundle}, "is the source itself"),
        ({"precision": "fp16"}, "not one of int8, fp8"),
        ({"images": 0}, "give at least 1"),
        ({"compared": 0}, "give at least 1"),
        ({"method": "median"}, "is not one of max"),
        ({"precision": "fp8", "method": "mse"}, "for integers"),
        ({"percentile": 101}, "percentile 101 is not in 50..100"),
        ({"requests": [10]}, "class 10"),
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
    with pytest.raises(GtrError, match="holds mar-digits int8, this build is mar-digits fp8"):
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
    assert len(json.loads(shown.stdout)["layers"]) == 42
    assert plot.is_file()
    for arguments, message in (
        (("calibrate", digits_bundle, "--keep", "most"), "neither auto nor a number"),
        (("build", "--model", "mar-digits", "--engine", "onnxruntime", "--keep", "2"), "is not calibrated"),
        (("sensitivity", digits_bundle, "--plot", "x.jpg"), "does not end in .png"),
    ):
        refused = export_cli(*arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
