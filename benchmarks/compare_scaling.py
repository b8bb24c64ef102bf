"""How time grows with AR steps and with the model: tables and a plot from measured points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compare_contenders import ORIGINAL
from compare_plots import Bar, plot_stacked, time_parts
from compare_records import Record
from compare_summary import Points, table

SERIES = ("gtr", "gtr-fast")
"""These presets differ in their AR steps only; so do they with steps of their own."""


def _series(everything: Sequence[Points]) -> list[tuple[Points, Record]]:
    """Points of batch 1 that differ in AR steps only, by contender, of models with at least three numbers of steps."""
    groups: dict[tuple[str, str, str, int], dict[int, tuple[Points, Record]]] = {}
    for points in everything:
        for record in [*points.ran, *points.varied]:
            if record["batch"] == 1 and record["plan"].partition(":")[0] in SERIES:
                name = (record["model"], record["backend"], record["precision"], record["threads"])
                groups.setdefault(name, {}).setdefault(record["ar_steps"], (points, record))
    kept = [group for group in groups.values() if len(group) > 2]
    return [group[steps] for group in kept for steps in sorted(group)]


def steps_table(everything: Sequence[Points]) -> str:
    """Time over the number of AR steps."""
    rows = []
    for points, record in _series(everything):
        seconds, parts, floor = record["seconds"], record["parts"], points.floor(record)
        rows.append(
            [record["model"], f"{record['backend']} {record['precision']}", str(record["threads"]), record["plan"],
             str(record["ar_steps"]), str(record["head_calls"]), f"{record['flops'] / 1e12:.2f}", f"{seconds:.3g}",
             f"{parts['backbone']:.3g}", f"{parts['head']:.3g}",
             f"{seconds / record['ar_steps'] * 1e3:.0f}", "" if floor is None else f"{seconds / floor:.2f}"]
        )  # fmt: skip
    columns = ["model", "backend", "threads", "plan", "AR steps", "head calls", "TFLOPs", "s per image"]
    return table([*columns, "backbone, s", "head, s", "ms per AR step", "time ÷ floor"], rows)


def models_table(everything: Sequence[Points]) -> str:
    """Time over the size of the model, for what the largest model ran, by contender and number of threads."""
    rows = []
    for points in everything:
        if not points.models:
            continue
        ran = [r for r in points.ran if r["model"] == points.models[-1] and r["batch"] == 1]
        for plan, backend, precision in dict.fromkeys((r["plan"], r["backend"], r["precision"]) for r in ran):
            found = [points.find(model, plan, 1, backend, precision) for model in points.models]
            records = [records[0] for records in found if records]
            if len(records) < 2 or backend == ORIGINAL:
                continue
            for record in records:
                seconds, ratio = record["seconds"], points.ratio(record)
                rows.append(
                    [plan, f"{backend} {precision}", str(record["threads"]), record["model"],
                     f"{sum(record['weight_bytes'].values()) / 1e6:.0f}", f"{record['flops'] / 1e12:.3g}",
                     f"{seconds:.3g}", f"{record['flops'] / seconds / 1e9:.0f}",
                     "" if ratio is None else f"{ratio:.2f}"]
                )  # fmt: skip
    columns = ["plan", "backend", "threads", "model", "weights, MB", "TFLOPs", "s per image", "GFLOP/s"]
    return table([*columns, "times as fast"], rows)


def plot_scaling(everything: Sequence[Points], folder: Path) -> Path | None:
    """``performance-scaling.png``: seconds of one image over the number of AR steps; None where nothing has several."""
    bars = [
        Bar(f"{r['model']} {r['ar_steps']} AR steps  {r['precision']} ({p.threads})", list(time_parts(r).items()),
            f"{r['seconds']:.3g} s")
        for p, r in _series(everything)
        if p is everything[0] and r["backend"] == "onnxruntime"
    ]  # fmt: skip
    if not bars:
        return None
    path = folder / "performance-scaling.png"
    plot_stacked(
        path, "Seconds of one image over AR steps, without the VAE decoder (stages in gtr's proportions)", "s", bars
    )
    return path
