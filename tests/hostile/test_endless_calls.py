"""Calls that do not end within the time that they are given, and a library that does not survive a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from graph_cases import Copy, constant, model, spoil
from onnx import helper

from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.pipeline import Pipeline

pytestmark = pytest.mark.hostile


def _slow(copy: Copy) -> None:
    """A decoder that multiplies 3000 x 3000 matrices, made from its input, for minutes."""
    nodes = [
        helper.make_node("ReduceMax", ["latents"], ["most"], keepdims=0),
        helper.make_node("Expand", ["most", "large"], ["m0"]),
        *(helper.make_node("MatMul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]) for i in range(200)),
        helper.make_node("ReduceMax", ["m200"], ["last"], keepdims=0),
        helper.make_node("Cast", ["last"], ["byte"], to=onnx.TensorProto.UINT8),
        helper.make_node("Shape", ["latents"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "picture"], ["shape"], axis=0),
        helper.make_node("Expand", ["byte", "shape"], ["image"]),
    ]
    graph = model(nodes, [constant("large", [3000, 3000]), constant("picture", [32, 32, 3])])
    copy.put(graph)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_call_has_a_time_limit(digits_bundle: Path, tmp_path: Path, backend: str) -> None:
    bundle = spoil(digits_bundle, tmp_path / "bundle", tmp_path / "secret", _slow).folder
    command = [sys.executable, "-m", "gtr_deploy.runtime.cli", "generate", str(bundle), "--classes", "3", "--plan",
               "gtr-fast", "--backend", backend, "--threads", "1", "--out", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "GTR_CALL_LIMIT": "2"}
    )
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert (
        line
        == f"the decoder graph has been running for more than 2 s on backend {backend}; GTR_CALL_LIMIT sets the limit"
    )


@pytest.mark.parametrize("limit", ["soon", "0", "-1", "nan", "1e99"])
def test_a_limit_that_is_none(digits_bundle: Path, tmp_path: Path, run_cli, monkeypatch, limit: str) -> None:
    monkeypatch.setenv("GTR_CALL_LIMIT", limit)
    result = run_cli("generate", digits_bundle, "--classes", "3", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"GTR_CALL_LIMIT={limit} is not a number of seconds" in result.stderr


def test_openvino_says_that_it_does_not_survive_a_fork(digits_bundle: Path) -> None:
    pipeline = Pipeline.load(digits_bundle, "openvino", threads=1)
    child = os.fork()
    if child == 0:
        try:
            pipeline.generate([3], plan="gtr-fast")
        except BackendError as error:
            os._exit(0 if "load the bundle in the child" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
