"""A backend of another package moves in: one file (tests/toy/backend.py) and an entry point; every command knows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from toy.backend import ROW

from gtr_deploy.runtime.backends import registry
from gtr_deploy.runtime.backends.choice import choose_backend
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.machine.examine import Gpu, examine_machine
from gtr_deploy.runtime.pipeline import Pipeline

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def _entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("toy", "toy.backend:ROW", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])


def test_generate_and_help(run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
    done = run_cli(
        "generate", digits_bundle, "--classes", "3", "--plan", "gtr-fast", "--backend", "toy", "--out", tmp_path,
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["backend"] == "toy"
    assert "toy" in run_cli("generate", "--help").stdout


def test_doctor_and_bench(run_cli: Cli, digits_bundle: Path) -> None:
    doctor = json.loads(run_cli("doctor", digits_bundle, "--json").stdout)
    assert "toy" in doctor["can_run"]
    done = run_cli("bench", digits_bundle, "--plan", "gtr-fast", "--repeat", "1", "--all-backends", "--json")
    assert done.exit_code == 0, done.output
    measured = {row["backend"]: row for row in json.loads(done.stdout)["measurements"]}
    assert {"toy", "onnxruntime cpu"} <= set(measured)
    assert measured["toy"]["shares"]["head"] > 0.1


def test_verify(export_cli: Cli, own_bundle: Path) -> None:
    done = export_cli("verify", own_bundle, "--backend", "toy", "--plans", "gtr-fast", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rung_reached"] == "images"


def test_its_pictures_are_those_of_the_others(digits_bundle: Path, digits_pipeline: Pipeline) -> None:
    wanted = digits_pipeline.generate([3, 7], plan="gtr-fast").latents
    found = Pipeline.load(digits_bundle, backend="toy").generate([3, 7], plan="gtr-fast").latents
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_it_is_taken_unasked_only_if_its_rank_says_so(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, machine = Bundle.load(digits_bundle), examine_machine()
    assert choose_backend(bundle, machine)[0] != "toy"
    best = replace(ROW, rank=lambda bundle, machine: 1000)
    monkeypatch.setattr("toy.backend.ROW", best)
    assert choose_backend(bundle, machine)[0] == "toy"


def test_an_unknown_one_is_one_line(run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
    done = run_cli("generate", digits_bundle, "--classes", "3", "--backend", "caffe", "--out", tmp_path)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "'toy'" in done.stderr
    with pytest.raises(BackendError, match="not one of auto, onnxruntime, openvino, tensorrt, tensorrt-rtx, toy"):
        Pipeline.load(digits_bundle, backend="caffe")


@pytest.mark.parametrize("gpu", [None, Gpu("A GPU", "9.0", 1 << 30, "13.0")])
def test_why_says_nothing_of_other_libraries(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None
) -> None:
    bundle = Bundle.load(digits_bundle)
    machine = replace(examine_machine(), gpu=gpu, onnxruntime_providers=("CUDAExecutionProvider",))
    monkeypatch.setattr("toy.backend.ROW", replace(ROW, rank=lambda bundle, machine: 1000))
    assert choose_backend(bundle, machine) == ("toy", "its rank is the highest")
    because = replace(ROW, rank=lambda bundle, machine: 1000, because=lambda bundle, machine: "it is ours")
    monkeypatch.setattr("toy.backend.ROW", because)
    assert choose_backend(bundle, machine) == ("toy", "it is ours")


def test_it_may_need_any_distribution(digits_bundle: Path) -> None:
    bundle, machine = Bundle.load(digits_bundle), examine_machine()
    assert replace(ROW, library="rich", oldest=(13,)).refusal(bundle, machine) == ""
    assert "is too old, 9999 is needed" in replace(ROW, library="rich", oldest=(9999,)).refusal(bundle, machine)
    assert replace(ROW, library="no-such-thing").refusal(bundle, machine) == "no-such-thing is not installed"


@pytest.mark.parametrize("question", ["lacks", "refuses", "rank", "because", "what"])
def test_a_row_that_fails_takes_nothing_with_it(
    question: str, run_cli: Cli, digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Any:
        raise ZeroDivisionError("ours\nbroke")

    row = replace(ROW, **{"rank": lambda bundle, machine: 1000, question: fails})  # type: ignore[arg-type]
    monkeypatch.setattr("toy.backend.ROW", row)
    assert choose_backend(Bundle.load(digits_bundle), examine_machine())[0] in ("toy", "onnxruntime", "openvino")
    done = run_cli("doctor", digits_bundle, "--json")
    assert done.exit_code == 0, done.output
    (found,) = [finding for finding in json.loads(done.stdout)["findings"] if finding["subject"] == "backend toy"]
    refused = question in ("lacks", "refuses")
    assert found["status"] == ("missing" if refused else "ok")
    if refused or question == "what":
        assert found["detail"] == "its row fails: ZeroDivisionError: ours broke"


def test_it_cannot_take_the_name_of_another(run_cli: Cli, digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("onnxruntime", "toy.backend:ROW", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    findings = json.loads(run_cli("doctor", digits_bundle, "--json").stdout)["findings"]
    assert [f["status"] for f in findings if f["subject"] == "backend onnxruntime"] == ["missing"]
    assert Pipeline.load(digits_bundle, backend="onnxruntime", provider="cpu").backend.name == "onnxruntime"
