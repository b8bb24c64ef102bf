"""Profiles of real generations: parts add up, operators are found, the machine's rates are positive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import profile_generation
import pytest
import roofline
from profile_parts import HOST, PARTS, Clock, thinned
from roofline import Rates, combined

from gtr_deploy.runtime import UsageError
from gtr_deploy.runtime.models.architecture import ARCHITECTURES
from gtr_deploy.runtime.sampling.plan import preset, resolve


def test_parts_and_steps_add_up(run_cli: Any, digits_bundle: Path, tmp_path: Path) -> None:
    target, plot = tmp_path / "profile.json", tmp_path / "profile.png"
    options = ["--plan", "gtr-fast", "--ar-steps", "3", "--json", target, "--plot", plot]
    found = run_cli(digits_bundle, *options, group=profile_generation.profile)
    assert found.exit_code == 0, found.stderr
    value = json.loads(target.read_text(encoding="utf-8"))
    assert value["ar_steps"] == [0, 8, 15]
    assert sum(value["parts"].values()) == pytest.approx(value["seconds"], rel=1e-3)
    assert set(value["parts"]) == set(PARTS)
    for part in PARTS:
        assert value["parts"][part] == pytest.approx(sum(step[part] for step in value["steps"]))
        assert value["parts"][part] > 0
    assert value["host_share"] == pytest.approx(sum(value["parts"][part] for part in HOST) / value["seconds"])
    shares = [entry["share"] for entry in value["operators"] if entry["part"] == "head"]
    assert sum(shares) == pytest.approx(1.0)
    assert "MatMul" in {entry["name"] for entry in value["operators"]}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_backends_without_a_profiler_have_parts_only(run_cli: Any, digits_bundle: Path) -> None:
    options = ["--plan", "gtr-fast", "--ar-steps", "1", "--backend", "torch", "--json", "-"]
    found = run_cli(digits_bundle, *options, group=profile_generation.profile)
    assert found.exit_code == 0, found.stderr
    value = json.loads(found.stdout)
    assert value["operators"] == []
    assert value["parts"]["head"] > 0


def test_nested_parts_count_once() -> None:
    clock = Clock()
    inner = clock.wrap("noise", lambda: sum(range(20000)))
    clock.wrap("tables", lambda: [inner() for _ in range(20)])()
    assert clock.calls["noise"] == 20
    assert clock.seconds["noise"] > clock.seconds["tables"] > 0


def test_thinned_plans_keep_both_ends() -> None:
    architecture = ARCHITECTURES["mar-b"]
    plan = resolve(preset("gtr", architecture), architecture)
    assert [step.index for step in thinned(plan, 3).steps] == [0, 16, 31]
    assert thinned(plan, None) is plan
    assert thinned(plan, 99) is plan
    with pytest.raises(UsageError):
        thinned(plan, 0)


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "MATRIX_SIZES", (32,))
    monkeypatch.setattr(roofline, "MEMORY_BYTES", 2**16)
    found = roofline._measure(1, 0.01)
    assert found.matrix > 0
    assert found.memory > 0
    assert Rates.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(UsageError, match="0 threads"):
        roofline.measure_rates(0)


def test_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    rates = Rates(matrix=1e11, memory=1e10, threads=2, details={"a": 1.0})
    assert rates.floor(1e11, 1e9) == 1.0
    assert rates.floor(1e9, 1e10) == 1.0
    assert rates.text == "100 GFLOP/s, 10.0 GB/s on 2 threads"
    other = Rates(matrix=2e11, memory=1e9, threads=2, details={"a": 3.0, "b": 1.0})
    assert combined([rates, other]) == Rates(2e11, 1e10, 2, {"a": 3.0, "b": 1.0})
