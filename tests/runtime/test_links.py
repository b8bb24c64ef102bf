"""Bundles in the Hugging Face cache: links to blobs are followed, whatever library opens what lies there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from generating import FEW_STEPS, ok, pictures
from linked import in_a_cache
from PIL import Image

from gtr_deploy.runtime.bundle import links
from gtr_deploy.runtime.bundle.links import plain_files
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import BundleError

Cli = Callable[..., Result]
QUICK = ("--plan", "gtr-fast", *FEW_STEPS, "--threads", "1")


@pytest.fixture(scope="module")
def snapshot(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return in_a_cache(digits_bundle, tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_same_pictures(snapshot: Path, digits_bundle: Path, backend: str, run_cli: Cli, tmp_path: Path) -> None:
    before = sorted(snapshot.parents[1].rglob("*"))
    made = []
    for name, bundle in (("cache", snapshot), ("plain", digits_bundle)):
        out = tmp_path / name
        ok(run_cli("generate", bundle, "--classes", "3,7", "--backend", backend, *QUICK, "--out", out))
        made.append(np.stack([np.asarray(Image.open(file)) for file in pictures(out)]))
    np.testing.assert_array_equal(*made)
    assert sorted(snapshot.parents[1].rglob("*")) == before


def test_commands_that_read(snapshot: Path, run_cli: Cli, export_cli: Cli) -> None:
    assert "onnxruntime cpu, openvino" in ok(run_cli("doctor", snapshot)).stdout
    ok(run_cli("bench", snapshot, *QUICK, "--repeat", "1", "--backend", "onnxruntime"))
    ok(export_cli("inspect", snapshot))


def test_reports_take_the_place_of_links(digits_bundle: Path, tmp_path: Path, export_cli: Cli) -> None:
    snapshot = in_a_cache(digits_bundle, tmp_path)
    blobs = {path: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    result = ok(export_cli("verify", snapshot, "--plans", "gtr-fast", "--images", "1"))
    assert "rung reached: images" in result.stdout
    assert Bundle.load(snapshot).read_report("parity")["rung_reached"] == "images"
    assert {path: path.read_bytes() for path in (tmp_path / "blobs").iterdir()} == blobs


def test_tensorrt_parses_and_builds_through_links(snapshot: Path, tmp_path: Path, export_cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx")
    shutil.copytree(snapshot.parents[1], tmp_path / "hub", symlinks=True)
    own = tmp_path / "hub" / snapshot.relative_to(snapshot.parents[1])
    ok(export_cli("engine", own, "--engine", "tensorrt-rtx", "--compute-capability", "8.9", "--plans", "gtr-fast",
                  "--optimization-level", "0"))  # fmt: skip
    (engines,) = Bundle.load(own).engine_sets
    assert Bundle.load(own).engine_paths(engines)


def test_calibration_asks_for_a_copy(snapshot: Path, tmp_path: Path, export_cli: Cli) -> None:
    result = export_cli("calibrate", snapshot, "--out", tmp_path / "int8")
    assert result.exit_code == 1
    assert f"calibrate a copy: cp -rL {snapshot} COPY" in result.stderr
    assert not (tmp_path / "int8").exists()


@pytest.mark.parametrize("linkable", [True, False])
def test_plain_files(snapshot: Path, linkable: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside the blob, as a second name of it; or a copy elsewhere, where nobody may write to the cache."""
    if not linkable:
        real = links.tempfile.TemporaryDirectory

        def elsewhere(dir: Path | None = None, **options):
            if dir is not None:
                raise PermissionError
            return real(dir=tmp_path, **options)

        monkeypatch.setattr(links.tempfile, "TemporaryDirectory", elsewhere)
        monkeypatch.setattr(links.os, "link", lambda *_: (_ for _ in ()).throw(OSError()))
    graph = Bundle.load(snapshot).graph_files()["backbone"]
    blob = (snapshot / "graphs" / "backbone.onnx.data").resolve()
    with plain_files(graph) as plain:
        data = plain.path.with_name("backbone.onnx.data")
        assert os.path.samefile(data, blob) == linkable
        assert data.read_bytes() == blob.read_bytes()
        plain.confirm()
    assert not plain.path.parent.exists()


def test_a_blob_that_changes_is_noticed(digits_bundle: Path, tmp_path: Path) -> None:
    snapshot = in_a_cache(digits_bundle, tmp_path)
    graph = Bundle.load(snapshot).graph_files(checksums=False)["backbone"]
    blob = (snapshot / "graphs" / "backbone.onnx.data").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    for call in (graph.confirm, plain_files(graph).__enter__):
        with pytest.raises(BundleError, match="was changed while"):
            call()
    with pytest.raises(BundleError, match="the manifest says"):
        Bundle.load(snapshot).graph_files(checksums=False)
