"""The manifest reader: what is sound is read, everything else is refused with one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtr_deploy.runtime.bundle.reader import Bundle, StoredFile
from gtr_deploy.runtime.errors import BundleError
from gtr_deploy.runtime.models.architecture import ARCHITECTURES
from gtr_deploy.runtime.models.graphs import NETWORKS, ROW_GRAPHS


def _edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


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
        (lambda m: m.update(schema=2), "schema 2, this version reads schema 1"),
        (lambda m: m.pop("schema"), "schema None"),
        (lambda m: m.update(extra=1), "missing or unknown fields: extra"),
        (lambda m: m.pop("tools"), "missing or unknown fields: tools"),
        (lambda m: m.update(graphs=[]), "graphs is not a dict"),
        (lambda m: m.update(max_batch=True), "max_batch is not a int"),
        (lambda m: m.update(max_batch=0), "max_batch 0 is not at least 1"),
        (lambda m: m["precision"].update(name="int4"), "precision 'int4' is not one of"),
        (lambda m: m["model"].update(width=-1), "width = -1 is not valid"),
        (lambda m: m["model"].update(label_names="cats"), "label_names 'cats'"),
        (lambda m: m["graphs"].pop("decoder"), "graphs are"),
        (lambda m: m["graphs"]["decoder"].update(extra=1), "must have exactly opset"),
        (lambda m: m["graphs"]["decoder"].update(opset="20"), "opset '20' is not a whole number"),
        (lambda m: m["graphs"]["decoder"]["inputs"][0].update(dtype="float16"), "other inputs or outputs"),
        (lambda m: m["model"].update(width=256), "other inputs or outputs"),
        (lambda m: m["graphs"]["decoder"]["model"].pop("bytes"), "exactly file, bytes and sha256"),
        (lambda m: m["graphs"]["decoder"]["model"].update(bytes=-1), "file or bytes is not valid"),
        (lambda m: m["graphs"]["decoder"]["model"].update(bytes=True), "file or bytes is not valid"),
        (lambda m: m["graphs"]["decoder"]["model"].update(sha256="zz"), "is not 64 hexadecimal digits"),
        (lambda m: m["graphs"]["decoder"]["model"].update(sha256="0" * 64), "the manifest says 000000000000"),
        (lambda m: m["graphs"]["decoder"]["model"].update(bytes=5), "the manifest says 5"),
        (lambda m: m["graphs"]["decoder"]["model"].update(file="../../etc/passwd"), "is not a path inside"),
        (lambda m: m["graphs"]["decoder"]["model"].update(file="/etc/passwd"), "is not a path inside"),
        (lambda m: m["graphs"]["decoder"]["model"].update(file="graphs/none.onnx"), "is missing from the bundle"),
        (lambda m: m["graphs"]["decoder"].update(data=3), "exactly file, bytes and sha256"),
    ],
)
def test_a_changed_manifest_is_refused(own_bundle: Path, change: Callable[[dict[str, Any]], Any], reason: str) -> None:
    _edit(own_bundle, change)
    assert reason in _refused(own_bundle)


@pytest.mark.parametrize("content", ["", "[]", "null", '"x"', "{"])
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
    assert "leads outside" in _refused(own_bundle)


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
    assert StoredFile.from_json(stored.to_json(), "here") == stored
    assert stored.check(tmp_path) == tmp_path / "x"
