"""Nothing half-written, nothing outside the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from gtr_deploy.runtime.errors import BundleError
from gtr_deploy.runtime.files import atomic_path, inside, link_or_copy, read_json, sha256, write_json


def test_atomic_path_replaces_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
        assert temporary.suffix == ".txt"
    assert target.read_text() == "one"
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "one"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_written_files_are_readable_by_others(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"a": 1, "a": 2}', "a key stands twice"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_hostile_json_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=reason) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is missing"):
        read_json(tmp_path / "none.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        read_json(tmp_path / "folder")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a\\..\\x", "a\0b"])
def test_paths_out_of_the_bundle_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(BundleError, match="is not a path inside"):
        inside(tmp_path, path)


def test_links_out_of_the_bundle_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    os.symlink(tmp_path, folder / "link")
    with pytest.raises(BundleError, match="leads outside"):
        inside(folder, "link/secret")


@given(st.text(alphabet="ab./\\", min_size=1, max_size=12))
def test_whatever_is_accepted_stays_inside(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        accepted = inside(folder, path)
    except BundleError:
        return
    assert accepted.resolve().is_relative_to(folder.resolve())


def test_json_is_plain_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"k": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"k": 1}


def test_weights_are_copied_since_onnx_refuses_them_with_two_links(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 8]) for name in "xy"]
    product = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([product], "g", tensors[:1], tensors[1:], [weights]))
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    for name in ("m.onnx", "m.onnx.data"):
        for _ in range(2):  # the second time in place of what is there
            link_or_copy(tmp_path / "a" / name, tmp_path / "b" / name)
    for folder in ("a", "b"):
        (read,) = onnx.load(tmp_path / folder / "m.onnx").graph.initializer
        assert np.array_equal(numpy_helper.to_array(read), np.ones((8, 8)))
