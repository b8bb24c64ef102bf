"""The manifest reader: what is sound is read, everything else is refused with one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from jobs import ARCHITECTURES

from gtr_deploy.runtime.bundle.manifest import StoredFile
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import BundleError
from gtr_deploy.runtime.models.graphs import NETWORKS, ROW_GRAPHS


def _edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _decoder(*place: str | int, **values: Any) -> Callable[[dict[str, Any]], Any]:
    """Changes the decoder's entry, or what lies at ``place`` in it."""
    return lambda manifest: reduce(getitem, place, manifest["graphs"]["decoder"]).update(values)


def _refused(bundle: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.load(bundle).graph_paths()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sound_bundle(digits_bundle: Path) -> None:
    bundle = Bundle.load(digits_bundle)
    assert bundle.architecture == ARCHITECTURES["mar-digits"]
    assert bundle.precision == "fp32"
    assert bundle.plan_defaults["max_timestep"] == 950
    assert set(bundle.graph_paths()) == {*NETWORKS, *ROW_GRAPHS}
    assert all(files.bytes > 0 and files.opset == 20 for files in bundle.graphs.values())


def test_no_bundle_at_all(tmp_path: Path) -> None:
    assert "is not a folder" in _refused(tmp_path / "nothing")
    assert "did not finish" in _refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format="zip"), "not the manifest of a gtr-deploy bundle"),
        (
            lambda m: m.update(schema=1),
            "schema 1, this version reads schema 3; rebuild the bundle with gtr-export",
        ),
        (lambda m: m.update(schema=3.0), "schema: Expected `int`, got `float`, found 3.0"),
        (lambda m: m.pop("schema"), "schema null"),
        (lambda m: m.update(extra=1), "manifest: Object contains unknown field `extra`"),
        (lambda m: m.update({"a\nb": 1}), "unknown field `a\\nb`"),
        (lambda m: m.update({"x - at `$.graphs[...].y": 1}), "unknown field"),
        (lambda m: m.pop("tools"), "manifest: Object missing required field `tools`"),
        (lambda m: m.update(graphs=[]), "graphs: Expected `object`, got `array`, found []"),
        (lambda m: m.update(max_batch=True), "max_batch: Expected `int`, got `bool`, found true"),
        (lambda m: m.update(max_batch=0), "max_batch: Expected `int` >= 1, found 0"),
        (lambda m: m.update(max_batch=4097), "max_batch: Expected `int` <= 4096, found 4097"),
        (lambda m: m["precision"].update(name="int4"), 'precision: precision "int4" is not one of fp32, '),
        (lambda m: m["plan_defaults"].update(cfg=[1]), "plan_defaults.cfg: Expected `int | float`, got `array`"),
        (lambda m: m["source"].pop("calibration"), "source: Object missing required field `calibration`, found ["),
        (
            lambda m: m["source"]["checkpoint"].update(sha256="A" * 64),
            "source.checkpoint.sha256: Expected `str` matching",
        ),
        (lambda m: m["model"].update(width=-1), "model: Expected `int` >= 1 - at `$.width`"),
        (lambda m: m["model"].update(family="gan"), "model: family 'gan' is not one of mar"),
        (lambda m: m["conditioning"].update(class_names=["cat"]), "1 class names for a model of 10 classes"),
        (lambda m: m["graphs"].pop("decoder"), "graphs are"),
        (_decoder(extra=1), "graphs.decoder: Object contains unknown field `extra`"),
        (
            lambda m: m["graphs"]["decoder"].update(opset="20"),
            'graphs.decoder.opset: Expected `int`, got `str`, found "20"',
        ),
        (
            lambda m: m["graphs"]["decoder"]["inputs"][0].update(dtype="float16"),
            "input 1 is float16 latents[B,64,16], expected latents[B,64,16]",
        ),
        (
            lambda m: m["graphs"]["decoder"]["inputs"][0].update(more=1),
            "decoder.inputs[0]: Object contains unknown field",
        ),
        (lambda m: m["model"].update(width=256), "graphs.backbone has other inputs or outputs"),
        (
            lambda m: m["graphs"]["decoder"]["model"].pop("bytes"),
            "decoder.model: Object missing required field `bytes`",
        ),
        (_decoder("model", bytes=-1), "graphs.decoder.model.bytes: Expected `int` >= 0"),
        (
            lambda m: m["graphs"]["decoder"]["model"].update(bytes=True),
            "decoder.model.bytes: Expected `int`, got `bool`",
        ),
        (
            lambda m: m["graphs"]["decoder"]["model"].update(sha256="zz"),
            "decoder.model.sha256: Expected `str` matching",
        ),
        (_decoder("model", sha256="0" * 64 + "\n"), "decoder.model.sha256: Expected"),
        (_decoder("model", sha256="0" * 64), "the manifest says 000000000000"),
        (_decoder("model", bytes=5), "the manifest says 5"),
        (_decoder("model", file="../../etc/passwd"), "is not a path inside"),
        (_decoder("model", file="/etc/passwd"), "is not a path inside"),
        (_decoder("model", file="graphs/none.onnx"), "is missing from the bundle"),
        (
            lambda m: m["graphs"]["decoder"].update(data=3),
            "graphs.decoder.data: Expected `object | null`, got `int`, found 3",
        ),
        (
            lambda m: (m["graphs"]["decoder"].update(opset=0), m["tools"].update(x="\ud800")),
            "opset: Expected `int` >= ",
        ),
        (lambda m: m["reports"].update(parity="x"), 'reports.parity: Expected `object`, got `str`, found "x"'),
    ],
)
def test_a_changed_manifest_is_refused(own_bundle: Path, change: Callable[[dict[str, Any]], Any], reason: str) -> None:
    _edit(own_bundle, change)
    assert reason in _refused(own_bundle)


def test_a_key_that_stands_twice(own_bundle: Path) -> None:
    path = own_bundle / "manifest.json"
    path.write_text(path.read_text().replace('"max_batch"', '"max_batch": 9999, "max_batch"', 1))
    assert "a key stands twice" in _refused(own_bundle)


def test_what_is_no_json_number(own_bundle: Path) -> None:
    _edit(own_bundle, lambda m: m["plan_defaults"].update(cfg=float("nan")))
    assert "manifest.json cannot be read: JSON is malformed" in _refused(own_bundle)


@pytest.mark.parametrize("content", ["", "[]", "null", '"x"', "{", '{"a":' * 100_000])
def test_a_manifest_that_is_no_manifest(own_bundle: Path, content: str) -> None:
    (own_bundle / "manifest.json").write_text(content)
    assert "manifest" in _refused(own_bundle)


def test_a_truncated_graph(own_bundle: Path) -> None:
    path = own_bundle / "graphs" / "backbone.onnx"
    path.write_bytes(path.read_bytes()[:-10])
    assert "bytes, the manifest says" in _refused(own_bundle)


def test_a_changed_byte(own_bundle: Path) -> None:
    path = own_bundle / "graphs" / "backbone.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "sha256" in _refused(own_bundle)
    assert Bundle.load(own_bundle).graph_paths(checksums=False)


def test_a_graph_that_is_a_link_out(own_bundle: Path, tmp_path: Path) -> None:
    path = own_bundle / "graphs" / "backbone.onnx"
    outside = tmp_path / "outside.onnx"
    path.rename(outside)
    path.symlink_to(outside)
    assert Bundle.load(own_bundle).graph_paths()["backbone"] == path  # it is what the manifest says
    outside.write_bytes(outside.read_bytes()[:-1] + b"x")
    assert "the manifest says" in _refused(own_bundle)


def test_reports_are_listed_and_checked(own_bundle: Path) -> None:
    bundle = Bundle.load(own_bundle)
    assert bundle.read_report("parity") is None
    bundle.write_report("parity", {"a": 1})
    bundle = Bundle.load(own_bundle)
    assert bundle.read_report("parity") == {"a": 1}
    (own_bundle / "reports" / "parity.json").write_text('{"a": 2}')
    with pytest.raises(BundleError):
        bundle.read_report("parity")


def test_stored_file_describes_itself(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    stored = StoredFile.of(tmp_path, "x")
    assert stored.check(tmp_path) == tmp_path / "x"
