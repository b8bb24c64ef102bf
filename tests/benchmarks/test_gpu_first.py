"""The first measurements on a GPU, on the stand-in: they run, and leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes.machine import FakeMachine
from gpu_first import main


def test_graphs_are_measured_and_given_back(fake_gpu: FakeMachine, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--nodes", "10,100", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["gpu"] == "Fake H100"
    assert [each["nodes"] for each in found["graphs"]] == [10, 100]
    assert {each["bytes_per_node"] for each in found["graphs"]} == {fake_gpu.node_bytes}
    assert fake_gpu.leaks() == []


def test_without_a_gpu_it_is_one_line(fake_gpu: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    fake_gpu.devices = []
    assert main([]) == 1
    assert capsys.readouterr().err.startswith("gpu_first: looking for a GPU: cudaErrorNoDevice")
