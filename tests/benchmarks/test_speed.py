"""Measuring mar-digits for real, in the smallest way; old and new records as tables and charts; errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import roofline
import speed
from click.testing import Result
from contenders import PipelineContender, Seconds
from original import OriginalContender
from PIL import Image
from records import FLAGS, append_record, points_of, read_records
from report import markdown, newest, plot_points
from roofline import Rates, measure_here

from gtr_deploy.runtime import BackendError, Bundle, UsageError
from gtr_deploy.runtime.commands.console import Reporter

OLD = speed.RESULTS.with_name("compare.jsonl")


@pytest.fixture
def run(run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command of speed.py."""
    monkeypatch.setattr(speed, "measure_rates", lambda threads: Rates(1e11, 1e10, threads))
    return lambda *arguments: run_cli(*arguments, group=speed.main)


def test_contenders_take_turns_and_ratios_are_from_one_run(run: Any, digits_bundle: Path, tmp_path: Path) -> None:
    results = tmp_path / "new" / "speed.jsonl"
    options = ["--plans", "mar,gtr-fast", "--backends", "onnxruntime,torch", "--rounds", 1, "--results", results]
    found = run("measure", digits_bundle, *options)
    assert found.exit_code == 0, found.stderr
    records = read_records(results)
    assert [(r["plan"], r["backend"]) for r in records] == [
        ("mar", "onnxruntime"), ("mar", "torch"), ("gtr-fast", "onnxruntime"),
    ]  # fmt: skip
    for record in records:
        assert record["seconds"] > 0.01
        assert record["cpu_seconds"] > 0.01
        assert record["environment"]["cpu"]
        assert set(record["environment"]["instructions"]) <= set(FLAGS)
        assert record["environment"]["versions"]["onnxruntime"]
    ours, reference, fast = points_of(records)
    assert reference.ratio == 1.0
    assert ours.ratio == pytest.approx(records[1]["seconds"] / records[0]["seconds"])
    assert fast.ratio == pytest.approx(records[1]["seconds"] / records[2]["seconds"])
    # The same again is another run: with one contender only it has no ratio, and takes none from the run before.
    append_record(results, {**records[2], "run": "9999"})
    again = points_of(read_records(results))[-1]
    assert again.record["run"] == "9999"
    assert again.ratio is None
    assert "| gtr-fast | 1 | onnxruntime fp32 | 1 |" in found.stdout


def test_batches_count_per_image(digits_bundle: Path) -> None:
    contender = PipelineContender("onnxruntime", Bundle.load(digits_bundle), 1)
    lines: list[Any] = []
    speed.take_turns([("gtr-fast", contender)], 2, 1, Reporter(quiet=True), lines.append, Rates(1e11, 1e10, 1))
    record = {"run": "one", "environment": {}, "threads": 1, **lines[0]}
    (point,) = points_of([record])
    assert point.seconds == pytest.approx(record["seconds"] / 2)
    assert record["flops"] == 2 * contender.pipeline.plan("gtr-fast").flops


def test_a_contender_that_fails_has_no_more_turns(digits_bundle: Path) -> None:
    class Contender:
        def __init__(self, backend: str, fails: bool) -> None:
            self.backend, self.fails, self.bundle, self.turns = backend, fails, Bundle.load(digits_bundle), 0

        def refusal(self, plan: Any) -> None: ...

        def generate(self, plan: Any, batch: int, seed: int) -> Seconds:
            self.turns += 1
            if self.fails:
                raise BackendError("out of\nmemory")
            return Seconds(1.0, 2.0)

        def close(self) -> None: ...

    good, bad, lines = Contender("good", False), Contender("bad", True), []
    work = [("mar", bad), ("mar", good), ("gtr", bad), ("gtr", good)]
    speed.take_turns(work, 1, 3, Reporter(quiet=True), lines.append, Rates(1e11, 1e10, 1))
    assert (bad.turns, good.turns) == (1, 6)
    assert [line["plan"] for line in lines] == ["mar", "gtr"] * 3


def test_records_of_older_versions_are_read(tmp_path: Path) -> None:
    """Their calls that were put together count as one generation; whole generations of the same run go before."""
    points = points_of(read_records(OLD))
    best = [point for point in newest(points, best=True) if point.record["model"] == "mar-b"]
    quiet = [p for p in best if p.record["threads"] == 2 and p.record["batch"] == 1]
    fastest = min(quiet, key=lambda point: point.seconds if point.record["plan"] == "gtr-fast" else 1e9)
    assert fastest.record["mode"] == "whole"
    assert fastest.ratio == pytest.approx(18.0, abs=0.1)
    assert fastest.cpu_seconds == pytest.approx(22.4, abs=0.1)
    assert "| mar-b | gtr-fast | 1 | onnxruntime int8 | 2 | 11.3 | 22.4 | 17.98 |" in markdown(best)
    shown = [point for point in quiet if point.record["plan"] in ("mar", "gtr", "gtr-fast")]
    plot_points(tmp_path / "plot.png", shown)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 900
    with pytest.raises(UsageError, match="1 to 12 points"):
        plot_points(tmp_path / "plot.png", points)


def test_three_generations_have_an_interval() -> None:
    environment = {"cpu": "A CPU", "instructions": ["avx2"], "cores": 2, "gpu": None}
    record = {"model": "m", "plan": "gtr", "batch": 1, "backend": "b", "precision": "fp32", "threads": 1, "run": "one"}
    lines = [record | {"environment": environment, "flops": 1, "seconds": s, "cpu_seconds": s} for s in (9, 10, 11)]
    (point,) = points_of(lines)
    assert (point.seconds, point.half_interval) == (10, pytest.approx(1.13, abs=0.01))
    assert "| 10 ± 1.1 |" in markdown([point])
    assert points_of(lines[:2])[0].half_interval is None


def test_profile_tells_graphs_and_host_apart(run: Any, digits_bundle: Path, tmp_path: Path) -> None:
    results = tmp_path / "profile.jsonl"
    found = run("profile", digits_bundle, "--plan", "gtr", "--results", results)
    assert found.exit_code == 0, found.stderr
    (record,) = read_records(results)
    assert set(record["parts"]) == {"backbone", "modulation", "diffusion_step", "detail_score", "decoder", "host"}
    assert sum(record["parts"].values()) == pytest.approx(record["seconds"])
    assert all(seconds > 0 for seconds in record["parts"].values())
    assert record["calls"]["backbone"] == 24
    assert record["calls"]["decoder"] == 1
    stored = read_records(speed.PROFILES)
    assert {"backbone", "diffusion_step", "host"} <= set(stored[0]["parts"])


@pytest.mark.parametrize("line", ["{", "[]", '{"model": 1}', "\x00"])
def test_unreadable_results(run: Any, digits_bundle: Path, tmp_path: Path, line: str) -> None:
    results = tmp_path / "r.jsonl"
    results.write_text(f"{line}\n", encoding="utf-8")
    for command in (("measure", digits_bundle), ("report",)):
        _one_line(run(*command, "--results", results), 2, "line 1 is not a measurement")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["measure", "nowhere"], 1, "nowhere"),
        (["measure"], 2, "BUNDLES"),
        (["measure", "nowhere", "--plans", "mar,other"], 2, "plan 'other'"),
        (["measure", "nowhere", "--plans", ","], 2, "plan ','"),
        (["measure", "nowhere", "--batch", "1,none"], 2, "--batch '1,none'"),
        (["report", "--model", "mar-x"], 2, "no such measurements"),
        (["profile", "nowhere"], 1, "nowhere"),
    ],
)
def test_bad_usage_is_one_line(run: Any, arguments: list[str], code: int, said: str) -> None:
    _one_line(run(*arguments), code, said)


def test_backends_that_cannot_run_are_said(run: Any, digits_bundle: Path, tmp_path: Path) -> None:
    found = run("measure", digits_bundle, "--backends", "abacus", "--results", tmp_path / "r.jsonl")
    assert "abacus: not measured: " in found.stderr
    assert found.exit_code == 2


def test_the_original_needs_a_checkout(tmp_path: Path, digits_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"has no models/mar\.py"):
        OriginalContender(tmp_path, Bundle.load(digits_bundle), 1)


def test_rates_and_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "MATRIX_SIZES", (32,))
    monkeypatch.setattr(roofline, "MEMORY_BYTES", 2**16)
    found = measure_here(1, 0.01)
    assert found.matrix > 0
    assert found.memory > 0
    rates = Rates(matrix=1e11, memory=1e10, threads=2)
    # A backbone bound by its FLOPs, and ten head calls bound by reading 100 MB at 10 GB/s.
    assert rates.floor([(1e12, 1e9, 10)], 1e9, 1e8) == pytest.approx(10.0 + 0.1)
    assert rates.floor([(1e12, 1e9, 10)], 1e7, 1e7) is None  # in a cache
    assert rates.text == "100 GFLOP/s, 10.0 GB/s, threads: 2"


def _one_line(found: Result, code: int, said: str) -> None:
    assert found.exit_code == code
    assert said in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr


def test_old_profiles_were_converted() -> None:
    for line in speed.PROFILES.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert sum(record["parts"].values()) == pytest.approx(record["seconds"], rel=1e-3)
