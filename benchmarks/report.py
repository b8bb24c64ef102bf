"""Measured points as a table and as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from records import NAMES, ORIGINAL, REFERENCES, Point
from roofline import Rates

from gtr_deploy.runtime import UsageError
from gtr_deploy.runtime.pictures.charts import BLUE, DARK, GREEN, GREY, ORANGE, new_figure, plain, save_figure

MOST_BARS = 12
COLUMNS = (
    "model", "plan", "batch", "backend", "threads", "s per image", "CPU s", "times as fast", "time ÷ floor", "measured",
)  # fmt: skip
_COLOURS = {"fp32": BLUE, "int8": ORANGE}


def newest(points: Sequence[Point], best: bool = False) -> list[Point]:
    """The last run's point of each contender on each CPU: models and plans by work, then slowest first.

    Args:
        points: oldest first.
        best: of each precision only the fastest contender, beside the references.
    """
    last = {(_machine(p.record), *(p.record[name] for name in NAMES)): p for p in points}
    chosen = sorted(last.values(), key=lambda point: point.seconds)
    if best:
        found: dict[tuple[Any, ...], Point] = {}
        for point in chosen:
            r = point.record
            who = r["backend"] if r["backend"] in REFERENCES else ""
            found.setdefault((_machine(r), r["model"], r["plan"], r["batch"], r["threads"], r["precision"], who), point)
        # The torch backend stands in for the original where that is missing; beside it, it says nothing new.
        originals = {(_machine(r), r["model"]) for r in (p.record for p in found.values()) if r["backend"] == ORIGINAL}
        chosen = [
            point
            for point in found.values()
            if point.record["backend"] != "torch" or (_machine(point.record), point.record["model"]) not in originals
        ]
    work: dict[str, float] = {}
    for point in chosen:
        r = point.record
        work[r["model"]] = max(work.get(r["model"], 0.0), r["flops"] / r["batch"])

    def order(point: Point) -> tuple[Any, ...]:
        r = point.record
        plan_work = -r["flops"] / r["batch"]
        return (work[r["model"]], _machine(r), r["threads"], plan_work, r["plan"], r["batch"], -point.seconds)

    return sorted(chosen, key=order)


def markdown(points: Sequence[Point]) -> str:
    """A table, then a line for each machine. ``±`` is half a 95 % interval, from three generations on."""
    rows = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    rows += ["| " + " | ".join(_cells(point)) + " |" for point in points]
    machines = "\n".join(dict.fromkeys(_machine(point.record) for point in points))
    return "\n".join([*rows, "", machines])


def _cells(point: Point) -> list[str]:
    r, least, cpu, half = point.record, floor(point.record), point.cpu_seconds, point.half_interval
    return [
        r["model"],
        r["plan"],
        str(r["batch"]),
        f"{r['backend']} {r['precision']}",
        str(r["threads"]),
        f"{point.seconds:.3g}" + ("" if half is None else f" ± {half:.2g}"),
        "" if cpu is None else f"{cpu:.3g}",
        "" if point.ratio is None else f"{point.ratio:.2f}",
        "" if least is None else f"{point.seconds * r['batch'] / least:.2f}",
        r["run"][:10],
    ]


def floor(record: Mapping[str, Any]) -> float | None:
    """Least seconds of the batch at the rates of the record's run; older lines have what it is computed from."""
    if "work" not in record:
        return record.get("floor_seconds")
    rates, weights = record["rates"], record["weight_bytes"]
    return Rates(rates["matrix"], rates["memory"], rates["threads"]).floor(
        record["work"], weights["backbone"], weights["head"]
    )


def _machine(record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    flags = ", ".join(environment["instructions"]) or "no known vector instructions"
    gpu = f", {environment['gpu']}" if environment["gpu"] else ""
    return f"{environment['cpu']} ({flags}), {environment['cores']} cores{gpu}"


def plot_points(path: Path, points: Sequence[Point]) -> None:
    """Writes a PNG: one bar per point, seconds and the ratio at its end.

    Raises:
        UsageError: there are more bars than a person can read, or none.
        GtrError: matplotlib is missing.
    """
    if not 0 < len(points) <= MOST_BARS:
        raise UsageError(
            f"--plot shows 1 to {MOST_BARS} points, these are {len(points)}; "
            "choose with --model, --plans, --batch, --threads or --best"
        )
    models = list(dict.fromkeys(point.record["model"] for point in points))
    title = f"{', '.join(models)}: seconds per image, without the decoder; times as fast as the reference"
    figure = new_figure(9, 1.2 + 0.34 * len(points), title, _machine(points[0].record))
    axes = figure.add_subplot()
    plain(axes, "x")
    rows = range(len(points))
    seconds = [point.seconds for point in points]
    colours = [
        GREY if point.record["backend"] in REFERENCES else _COLOURS.get(point.record["precision"], GREEN)
        for point in points
    ]
    axes.barh(rows, seconds, height=0.7, color=colours)
    for row, point in zip(rows, points, strict=True):
        half = point.half_interval
        if half is not None:
            axes.errorbar(point.seconds, row, xerr=half, color=DARK, elinewidth=1.5)
        text = f"{point.seconds:.3g} s" + ("" if point.ratio is None else f"   {point.ratio:.1f} x")
        end = (point.seconds + (half or 0.0), row)
        axes.annotate(text, end, (6, 0), textcoords="offset points", va="center", size=10, color=DARK)
    several = len(models) > 1
    axes.set_yticks(rows, [(f"{p.record['model']}  " if several else "") + p.name for p in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set_xlim(0, 1.2 * max(seconds))
    save_figure(path, figure)
