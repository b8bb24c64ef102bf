"""The project's targets for speed, and what the measured points say of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from compare_summary import Points, host_share, table

from gtr_deploy.runtime.sampling.plan import PRESETS

MODEL = "mar-b"
"""Ratios to the original are asked of this model."""

LARGE = ("mar-b", "mar-l", "mar-h")
CPU_BACKENDS = ("onnxruntime", "openvino")

FOREIGN = "target set for AVX-512/AMX"
"""Why int8 targets are out of reach on a CPU without 8-bit dot products, which none of the AVX2 ones has."""

GPU_TARGETS = (
    ("MAR-H fp16, batch 1, GPU: against the original, same GPU", "≥ 20, within 2 x of the floor"),
    ("MAR-H fp16, batch 64, GPU: throughput against the original, same GPU", "≥ 5"),
)

BATCHES = "cost per image, batch 1 → 8; peak memory"

MET, MISSED, NOT_RUN = "met", "**not met**", "not yet run"


@dataclass(frozen=True)
class Result:
    """One row: what is asked, what was measured, and the verdict."""

    target: str
    wanted: str
    measured: str
    verdict: str


def results(everything: Sequence[Points]) -> list[Result]:
    """All targets, by the first points and what they lack by the others. Ratios to the original name all numbers of
    threads: PyTorch's threads wait for each other in every operator, so that how many there are decides much."""
    rows = {row.target: row for row in _results(everything[0])}
    for points in everything[1:]:
        for row in _results(points):
            found = rows.get(row.target)
            if not row.measured:
                continue
            if found is None or not found.measured:
                rows[row.target] = replace(row, measured=f"{row.measured}; {points.threads}")
            elif row.wanted.startswith("≥"):
                text = f"{found.measured}; with {points.threads} {row.measured}"
                verdict = found.verdict
                if row.verdict.startswith(MISSED) and found.verdict == MET:
                    verdict = f"met, but {MISSED} with {points.threads}"
                rows[row.target] = replace(found, measured=text, verdict=verdict)
    # What has a number of its own replaces the line that stands for all of its kind.
    if any("batch 1 →" in name for name in rows if name != BATCHES):
        rows.pop(BATCHES, None)
    # Targets on a GPU stay last.
    last = {name for name, _ in GPU_TARGETS}
    return [row for row in rows.values() if row.target not in last] + [rows[name] for name, _ in GPU_TARGETS]


def _results(points: Points) -> list[Result]:
    return [
        _ratio(
            points, "`mar` fp32, ONNX Runtime, against the original, same plan", 1.8, "mar", "fp32", ("onnxruntime",)
        ),
        _ratio(points, "`gtr` fp32 against the original with `mar`", 5.0, "gtr", "fp32", CPU_BACKENDS),
        _ratio(points, "`gtr` int8 against the same", 11.0, "gtr", "int8", CPU_BACKENDS),
        _ratio(points, "`gtr-fast` int8 against the same", 20.0, "gtr-fast", "int8", CPU_BACKENDS),
        _amx(points),
        _ratio(points, "`gtr-fast`, best setting of a CPU, against the same", 30.0, "gtr-fast", None, CPU_BACKENDS),
        *(_roofline(points, model) for model in LARGE),
        *(_host(points, model) for model in points.models),
        *_batches(points),
        *(Result(target, wanted, "", f"{NOT_RUN} on a GPU") for target, wanted in GPU_TARGETS),
    ]


def targets_table(everything: Sequence[Points]) -> str:
    """Markdown."""
    rows = [[r.target, r.wanted, r.measured, r.verdict] for r in results(everything)]
    return table(["target", "wanted", "measured", ""], rows)


def _ratio(
    points: Points, target: str, wanted: float, plan: str, precision: str | None, backends: Sequence[str]
) -> Result:
    """Fastest point of the named kinds against the reference."""
    asked = f"≥ {wanted:g}"
    reference = points.reference(MODEL)
    if reference is None:
        return Result(target, asked, "", f"{NOT_RUN}: no reference for {MODEL}")
    found = [r for r in points.find(MODEL, plan, 1, None, precision) if r["backend"] in backends]
    if not found:
        return Result(target, asked, "", f"{NOT_RUN}: no {precision or ''} point of {MODEL} {plan}".replace("  ", " "))
    best = found[0]
    ratio = reference["seconds"] / best["seconds"]
    text = f"**{ratio:.2f}** ({best['backend']} {best['precision']}; {reference['seconds']:.1f} s → "
    text += f"{best['seconds']:.1f} s)"
    if best["threads"] == 1 and "cpu_seconds" in reference and "cpu_seconds" in best:
        # What other processes took from a single thread does not count here.
        text += f"; {reference['cpu_seconds'] / best['cpu_seconds']:.2f} by processor time"
    if reference["run"] != best["run"]:
        text += ", from two runs"
    instructions = best["environment"]["instructions"]
    vector = any(name in instructions for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    reason = "" if vector or (best["precision"] == "fp32" and precision is not None) else f" ({FOREIGN})"
    return Result(target, asked, text, MET if ratio >= wanted else MISSED + reason)


def _amx(points: Points) -> Result:
    target, asked = "`gtr` bf16, OpenVINO with AMX, against the same", "≥ 18"
    found, reference = points.find(MODEL, "gtr", 1, "openvino", "bf16"), points.reference(MODEL)
    has_amx = any("amx_bf16" in record["environment"]["instructions"] for record in points.ran)
    if not has_amx:
        return Result(target, asked, "", f"{NOT_RUN}: this CPU has no AMX")
    if not found or reference is None:
        return Result(target, asked, "", f"{NOT_RUN}: no bf16 point")
    ratio = reference["seconds"] / found[0]["seconds"]
    return Result(target, asked, f"**{ratio:.2f}**", MET if ratio >= 18 else MISSED)


def _roofline(points: Points, model: str) -> Result:
    """The worst fp32 point of this project's CPU backends, batch 1."""
    target = f"{model}: any plan fp32, time ÷ (FLOPs ÷ matrix rate)"
    found = [
        r for r in points.ran
        if r["model"] == model and r["precision"] == "fp32" and r["batch"] == 1 and r["backend"] in CPU_BACKENDS
    ]  # fmt: skip
    # Per plan the backend that a user would take: the faster one.
    best = {plan: points.find(model, plan, 1, None, "fp32") for plan in {r["plan"] for r in found}}
    fastest = {
        plan: next(r for r in ranked if r["backend"] in CPU_BACKENDS) for plan, ranked in best.items() if ranked
    }  # fmt: skip
    if not fastest:
        return Result(target, "≤ 1.3", "", f"{NOT_RUN} on {model}")
    gaps = {plan: r["seconds"] / points.matrix_seconds(r) for plan, r in fastest.items()}
    floors = {plan: r["seconds"] / (points.floor(r) or math.inf) for plan, r in fastest.items()}
    order = [plan for plan in PRESETS if plan in gaps]
    text = ", ".join(f"`{plan}` {gaps[plan]:.2f} ({floors[plan]:.2f} x its floor)" for plan in order)
    return Result(target, "≤ 1.3", text, MET if max(gaps.values()) <= 1.3 else MISSED)


def _host(points: Points, model: str) -> Result:
    """The largest share among this project's CPU backends."""
    found = [r for r in points.ran if r["model"] == model and r["backend"] in CPU_BACKENDS]
    target = f"{model}: share of the host"
    if not found:
        return Result(target, "≤ 2 %", "", NOT_RUN)
    worst = max(found, key=host_share)
    text = f"at most {host_share(worst):.2%} ({worst['plan']}, {worst['backend']} {worst['precision']})"
    return Result(target, "≤ 2 %", text, MET if host_share(worst) <= 0.02 else MISSED)


def _batches(points: Points) -> list[Result]:
    """Cost per image at the largest batch against batch 1; and how well a line fits peak memory."""
    rows: list[Result] = []
    names = {(r["model"], r["plan"], r["backend"], r["precision"]) for r in points.ran if r["batch"] > 1}
    for model, plan, backend, precision in sorted(names):
        sizes = sorted({r["batch"] for r in points.ran if (r["model"], r["plan"]) == (model, plan)})
        own = [found[0] for size in sizes if (found := points.find(model, plan, size, backend, precision))]
        if len(own) < 2 or own[0]["batch"] != 1:
            continue
        first, last = own[0], own[-1]
        growth = (last["seconds"] / last["batch"]) / first["seconds"]
        rows.append(
            Result(
                f"{model} `{plan}` {backend} {precision}: cost per image, batch 1 → {last['batch']}",
                "does not grow",
                f"x {growth:.2f}",
                MET if growth <= 1.02 else MISSED,
            )
        )
        peaks = [(r["batch"], r["peak_bytes"]) for r in own if r["peak_bytes"]]
        if len(peaks) >= 3:
            batches, values = np.array(peaks, dtype=np.float64).T
            slope, start = np.polyfit(batches, values, 1)
            off = float(np.abs(values - (start + slope * batches)).max() / values.max())
            rows.append(
                Result(
                    f"{model} `{plan}` {backend} {precision}: peak memory",
                    "linear",
                    f"{start / 1e6:.0f} MB + {slope / 1e6:.0f} MB per image, off by at most {off:.1%}",
                    MET if off <= 0.05 else MISSED,
                )
            )
    return rows or [Result(BATCHES, "does not grow; linear", "", NOT_RUN)]
