"""Measuring mar-digits for real, in the smallest way; resuming; what goes wrong in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_cli
import compare_run
import pytest
from click.testing import Result
from compare_bundles import write_int8
from compare_memory import main as memory_command
from compare_original import OriginalContender
from compare_records import append_record, read_records
from roofline import Rates

from gtr_deploy.runtime import BackendError, Bundle, UsageError

Measure = Callable[..., Result]


@pytest.fixture
def results_file(tmp_path: Path) -> Path:
    return tmp_path / "results" / "points.jsonl"


@pytest.fixture
def measure(run_cli: Any, monkeypatch: pytest.MonkeyPatch, results_file: Path) -> Measure:
    """``compare.py measure`` of one plan on ONNX Runtime, unless told otherwise."""
    monkeypatch.setattr(compare_cli, "measure_rates", lambda threads: Rates(1e11, 1e10, threads, {}))

    def call(*arguments: str | Path, backends: str = "onnxruntime") -> Result:
        options = ["--plans", "gtr-fast", "--backends", backends, "--rounds", "1", "--results", results_file]
        return run_cli("measure", *options, *arguments, group=compare_cli.main)

    return call


def test_points_are_measured_once(measure: Measure, digits_bundle: Path, results_file: Path) -> None:
    arguments = [digits_bundle, "--mode", "calls", "--samples", "3"]
    first = measure(*arguments)
    assert first.exit_code == 0, first.stderr
    assert "mar-digits | gtr-fast | 1 | onnxruntime fp32 | 1 | calls" in first.stdout
    (record,) = read_records(results_file)
    assert record["seconds"] == pytest.approx(sum(record["parts"].values()))
    assert sum(call[record["columns"].index("head_seconds")] for call in record["calls"]) == pytest.approx(
        record["parts"]["head"], rel=1e-4
    )
    assert record["environment"]["versions"]["onnxruntime"]
    assert record["load_before"] is not None
    assert "3 of 16 AR steps" in record["note"]
    again = measure(*arguments)
    assert "nothing new" in again.stderr
    assert len(read_records(results_file)) == 1
    assert measure(*arguments, "--force").exit_code == 0
    assert len(read_records(results_file)) == 2


def test_whole_generations_and_peak_memory(
    measure: Measure, digits_bundle: Path, results_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_run, "peak_of", lambda *arguments: 123_000_000)
    found = measure(digits_bundle, "--batch", "1,2", "--memory", "gtr-fast")
    assert found.exit_code == 0, found.stderr
    one, two = read_records(results_file)
    assert (one["mode"], one["batch"], two["batch"]) == ("whole", 1, 2)
    assert two["flops"] == 2 * one["flops"]
    assert one["peak_bytes"] == 123_000_000
    assert "| 2 |" in found.stdout.split("## batches")[1]


def test_memory_of_the_largest_calls(run_cli: Any, digits_bundle: Path) -> None:
    found = run_cli(digits_bundle, "onnxruntime", "gtr-fast", "2", group=memory_command)
    assert json.loads(found.stdout)["peak_bytes"] > 10_000_000


def test_a_contender_that_cannot_run_says_why_and_is_tried_again(
    measure: Measure, digits_bundle: Path, results_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise BackendError("the library\nis not here")

    with monkeypatch.context() as patched:
        patched.setattr(compare_run, "open_contender", refuse)
        found = measure(digits_bundle, "--mode", "calls", "--samples", "2")
    assert "not run: the library is not here" in found.stderr
    (record,) = read_records(results_file)
    assert record["not_run"] == "the library is not here"
    assert measure(digits_bundle, "--mode", "calls", "--samples", "2").exit_code == 0
    assert "seconds" in read_records(results_file)[-1]


def test_arbitrary_ranges_make_a_bundle_that_runs(digits_bundle: Path, tmp_path: Path, measure: Measure) -> None:
    # A copy: onnx refuses weights that are hard links, which the shared bundle's may have become.
    out = tmp_path / "int8"
    write_int8(digits_bundle, out)
    bundle = Bundle.load(out)
    assert bundle.precision == "int8"
    assert set(bundle.graph_paths(target="cpu")) == set(bundle.graph_paths())
    found = measure(out, "--mode", "calls", "--samples", "2")
    assert found.exit_code == 0, found.stderr
    assert "onnxruntime int8" in found.stdout
    with pytest.raises(UsageError, match="is int8"):
        write_int8(out, tmp_path / "again")


@pytest.mark.parametrize("line", ["{", "[]", '{"key": 1}', "\x00"])
def test_unreadable_results(measure: Measure, digits_bundle: Path, results_file: Path, line: str) -> None:
    append_record(results_file, dict.fromkeys(("key", "model", "plan", "batch", "backend", "precision"), "x"))
    results_file.write_text(f"{line}\n", encoding="utf-8")
    found = measure(digits_bundle)
    assert found.exit_code == 2
    assert "line 1 is not a measured point" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere"], 1, "nowhere is not a folder"),
        ([], 1, "no bundles"),
        (["nowhere", "--plans", "mar,other"], 2, "--plans 'other'"),
        (["nowhere", "--plans", "gtr:24+6"], 2, "--plans 'gtr:24+6'"),
        (["nowhere", "--plans", "gtr:24+x+2"], 2, "--plans 'gtr:24+x+2'"),
        (["nowhere", "--plans", "gtr:0+6+2"], 2, "--plans 'gtr:0+6+2'"),
        (["nowhere", "--plans", ","], 2, "--plans ','"),
        (["nowhere", "--batch", "1,none"], 2, "--batch '1,none'"),
        (["nowhere", "--memory", "x"], 2, "--memory 'x'"),
        (["--make", "mar-x"], 2, "--make mar-x"),
    ],
)
def test_bad_usage_is_one_line(measure: Measure, arguments: list[str], code: int, said: str) -> None:
    found = measure(*arguments)
    assert found.exit_code == code
    assert said in found.stderr.splitlines()[-1]


def test_unknown_backend(measure: Measure, digits_bundle: Path) -> None:
    found = measure(digits_bundle, backends="abacus")
    assert found.exit_code == 2
    assert found.stderr.startswith("main: --backends 'abacus': not one of")
    assert len(found.stderr.strip().splitlines()) == 1


def test_two_bundles_of_one_kind(measure: Measure, digits_bundle: Path) -> None:
    found = measure(digits_bundle, digits_bundle)
    assert found.exit_code == 2
    assert "name one of them" in found.stderr


def test_summary_without_points(run_cli: Any, tmp_path: Path) -> None:
    found = run_cli("summary", "--results", tmp_path / "none.jsonl", group=compare_cli.main)
    assert found.exit_code == 2
    assert "no measured points" in found.stderr


def test_the_original_needs_a_checkout(tmp_path: Path, digits_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"has no models/mar\.py"):
        OriginalContender(tmp_path, Bundle.load(digits_bundle), 1)


def test_suite_fills_the_page(
    run_cli: Any, digits_bundle: Path, tmp_path: Path, results_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, page = tmp_path / "bundles", tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    page.write_text(compare_cli.DOCS.read_text(encoding="utf-8"), encoding="utf-8")
    folder.mkdir()
    (folder / "mar-digits-fp32").symlink_to(digits_bundle)
    write_int8(digits_bundle, folder / "mar-digits-int8")
    plans = ("gtr-fast", "gtr:2+1+1", "gtr:3+1+1")
    part = {"model": "mar-digits", "plans": plans, "mode": "calls", "samples": 2, "backends": ("onnxruntime",)}
    monkeypatch.setattr(compare_cli, "SUITE", (part,))
    monkeypatch.setattr(compare_cli, "PROFILES", (("mar-digits-fp32", "gtr-fast", 1),))
    monkeypatch.setattr(compare_cli, "make_bundles", lambda *_: None)
    monkeypatch.setattr(compare_cli, "measure_rates", lambda threads, _: Rates(1e11, 1e10, threads, {}))
    options = ["--folder", folder, "--docs", page, "--results", results_file, "--rounds", "1"]
    found = run_cli("suite", *options, group=compare_cli.main)
    assert found.exit_code == 0, found.stderr
    text = page.read_text(encoding="utf-8")
    assert "mar-digits fp32 `gtr-fast`, 1 AR steps" in text
    assert "onnxruntime int8" in text
    images = {path.name for path in (page.parent / "images").iterdir()}
    assert images == {f"performance-{name}.png" for name in ("latency", "parts", "profile", "scaling")}
    steps, models = (
        text.partition(f"measured: {name} -->")[2].partition("<!-- end")[0] for name in ("AR steps", "models")
    )
    assert [line.split(" | ")[3:5] for line in steps.splitlines() if "int8" in line] == [
        ["gtr:2+1+1", "4"], ["gtr:3+1+1", "5"], ["gtr-fast", "16"],
    ]  # fmt: skip
    assert "gtr:2+1+1" not in text.partition("## All points")[2].partition("## Batch sizes")[0]
    assert "mar-digits" not in models  # one model says nothing of its size
