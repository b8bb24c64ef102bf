"""Tables and verdicts from made-up points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare_plots import nice_step, plot_points
from compare_records import latest
from compare_scaling import models_table
from compare_summary import (
    Points,
    batch_table,
    embed,
    machine_text,
    points_table,
    refused_table,
    validation_table,
)
from compare_targets import GPU_TARGETS, results, targets_table
from PIL import Image
from roofline import Rates

from gtr_deploy.runtime import UsageError

RATES = Rates(matrix=1e11, memory=1e10, threads=1, details={})


def point(**changes: Any) -> dict[str, Any]:
    seconds = changes.pop("seconds", 100.0)
    record: dict[str, Any] = {
        "key": repr(sorted(changes.items())),
        "model": "mar-b",
        "plan": "mar",
        "batch": 1,
        "backend": "onnxruntime",
        "precision": "fp32",
        "threads": 1,
        "mode": "calls",
        "run": "one",
        "date": "2026-01-02T03:04:05Z",
        "environment": {
            "machine": "A CPU (avx2), 2 cores",
            "cpu": "A CPU",
            "instructions": ["avx2"],
            "versions": {"python": "3.12"},
            "code": "abc",
        },
        "rates": RATES.to_json(),
        "flops": 1e13,
        "seconds": seconds,
        "parts": {"backbone": 0.6 * seconds, "head": 0.39 * seconds, "host": 0.01 * seconds},
        "work": [[9e12, 1e12, 100]],
        "weight_bytes": {"backbone": 7e8, "head": 1.4e8},
        "peak_bytes": None,
        "load_before": [0.1, 0.1, 0.1],
        "load_after": [1.0, 0.5, 0.2],
        "note": "",
    }
    record |= changes
    if "not_run" in record:
        record.pop("seconds")
    return record


def verdicts(records: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {row.target: (row.measured, row.verdict) for row in results(Points.all(latest(records)))}


def test_ratios_are_against_the_original_if_it_ran() -> None:
    records = [point(seconds=50.0), point(backend="torch", seconds=100.0)]
    target = "`mar` fp32, ONNX Runtime, against the original, same plan"
    assert "**2.00**" in verdicts(records)[target][0]
    assert "stands in" in machine_text(Points.all(records))
    records.append(point(backend="original", seconds=80.0))
    measured, verdict = verdicts(records)[target]
    assert "**1.60**" in measured
    assert verdict == "**not met**"
    assert "the original project's PyTorch code" in machine_text(Points.all(records))


def test_what_did_not_run_is_not_measured() -> None:
    found = verdicts([point(plan="gtr", precision="int8")])
    assert found["`gtr` int8 against the same"] == ("", "not yet run: no reference for mar-b")
    assert "no AMX" in found["`gtr` bf16, OpenVINO with AMX, against the same"][1]
    assert found["MAR-H fp16, batch 1, GPU: against the original, same GPU"] == ("", "not yet run on a GPU")
    assert found["mar-h: any plan fp32, time ÷ (FLOPs ÷ matrix rate)"] == ("", "not yet run on mar-h")


def test_int8_targets_name_the_machine_they_were_set_on() -> None:
    records = [point(backend="original"), point(plan="gtr", precision="int8", seconds=10.0)]
    measured, verdict = verdicts(records)["`gtr` int8 against the same"]
    assert "**10.00**" in measured
    assert "AVX-512" in verdict
    other = [point(backend="original"), point(plan="gtr", precision="int8", seconds=5.0, run="two")]
    measured, verdict = verdicts(other)["`gtr` int8 against the same"]
    assert "from two runs" in measured
    assert verdict == "met"


def test_gap_host_and_batches() -> None:
    records = [
        point(seconds=120.0),
        point(plan="gtr-fast", seconds=300.0, parts={"backbone": 200.0, "head": 90.0, "host": 10.0}),
        *(point(batch=size, seconds=90.0 * size, flops=1e13 * size) for size in (2, 8)),
    ]
    for record, peak in zip([records[0], *records[2:]], (1100e6, 1200e6, 1800e6), strict=True):
        record["peak_bytes"] = peak
    found = verdicts(records)
    measured, verdict = found["mar-b: any plan fp32, time ÷ (FLOPs ÷ matrix rate)"]
    assert "`mar` 1.20" in measured
    assert "`gtr-fast` 3.00" in measured
    assert verdict == "**not met**"
    assert found["mar-b: share of the host"][0].startswith("at most 3.33%")
    assert found["mar-b `mar` onnxruntime fp32: cost per image, batch 1 → 8"] == ("x 0.75", "met")
    assert found["mar-b `mar` onnxruntime fp32: peak memory"] == (
        "1000 MB + 100 MB per image, off by at most 0.0%",
        "met",
    )
    assert "| 1 | 8 | 90 | 1800 |" in batch_table(Points.all(records))


def test_floor_of_models_that_fit_a_cache_is_left_out() -> None:
    record = point(weight_bytes={"backbone": 3e6, "head": 1e6})
    points = Points.of([record])
    assert points.floor(record) is None
    assert points_table([points]).endswith("|  |")
    # 9e12 FLOPs at 1e11/s, and 100 head calls that are bound by reading 140 MB at 10 GB/s or by 1e10 FLOPs.
    assert Points.of([point()]).floor(point()) == pytest.approx(90.0 + 10.0)


def test_the_newest_point_counts_and_other_machines_do_not() -> None:
    elsewhere = point(seconds=1.0)
    elsewhere["environment"] = {**elsewhere["environment"], "machine": "Another"}
    records = [elsewhere, point(seconds=70.0), point(seconds=50.0), point(plan="gtr", not_run="no such library")]
    points = Points.of(latest(records))
    assert [record["seconds"] for record in points.ran] == [50.0]
    assert "no such library" in refused_table([points])
    with pytest.raises(UsageError, match="no measured points"):
        Points.of([])


def test_both_modes_are_compared_and_calls_are_shown() -> None:
    points = Points.of([point(mode="whole", cpu_seconds=90.0), point(seconds=103.0, cpu_seconds=81.0)])
    assert "| 100 | 103 | +3.0% | 90 | 81 | -10.0% |" in validation_table([points])
    assert points.find("mar-b", "mar")[0]["mode"] == "calls"


def test_ratios_name_all_numbers_of_threads() -> None:
    two = {"threads": 2, "rates": Rates(1.8e11, 2e10, 2, {}).to_json()}
    records = [
        point(backend="original", seconds=160.0),
        point(seconds=100.0),
        point(backend="original", seconds=900.0, **two),
        point(seconds=50.0, **two),
        point(plan="gtr-fast", seconds=20.0, **two),
        point(model="mar-digits", seconds=1.0, plan="gtr", threads=1),
    ]
    assert [points.rates.threads for points in Points.all(records)] == [2, 1]
    found = verdicts(records)
    measured, verdict = found["`mar` fp32, ONNX Runtime, against the original, same plan"]
    assert measured.startswith("**18.00**")
    assert "with 1 thread **1.60**" in measured
    assert verdict == "met, but **not met** with 1 thread"
    assert found["mar-digits: share of the host"][0].endswith("; 1 thread")
    assert list(found)[-2:] == [name for name, _ in GPU_TARGETS]


def test_models_are_compared_where_several_ran_a_plan() -> None:
    """A plan that one model ran is left out, and so is the reference, which is in the column of ratios."""
    small, large = {"model": "mar-b"}, {"model": "mar-l", "flops": 4e13, "seconds": 500.0}
    records = [point(**small), point(**small, plan="gtr"), point(**large)]
    for model, seconds in ((small, 300.0), (large, 800.0)):
        records.append(point(**model | {"seconds": seconds}, backend="original"))
    lines = models_table(Points.all(latest(records))).splitlines()[2:]
    assert [line.strip("| ").split(" | ") for line in lines] == [
        ["mar", "onnxruntime fp32", "1", "mar-b", "840", "10", "100", "100", "3.00"],
        ["mar", "onnxruntime fp32", "1", "mar-l", "840", "40", "500", "80", "1.60"],
    ]


def test_documents_keep_what_is_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: targets -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    table = targets_table(Points.all([point()]))
    embed(page, {"targets": table})
    embed(page, {"targets": table})
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert text.count("| target |") == 1
    assert "old" not in text
    with pytest.raises(UsageError, match="measured: points"):
        embed(page, {"points": ""})


def test_plots(tmp_path: Path) -> None:
    records = [point(backend="original"), point(seconds=60.0), point(plan="gtr", precision="int8", seconds=9.0)]
    written = plot_points(Points.all(records), tmp_path)
    assert [path.name for path in written] == [f"performance-{n}.png" for n in ("latency", "parts", "roofline")]
    for path in written:
        with Image.open(path) as image:
            assert image.width > 600
            assert len(image.getcolors(1 << 16) or []) > 5


@pytest.mark.parametrize(("longest", "step"), [(23.7, 5.0), (1.0, 0.2), (0.03, 0.005), (100.0, 20.0)])
def test_axis_steps(longest: float, step: float) -> None:
    assert nice_step(longest) == pytest.approx(step)
