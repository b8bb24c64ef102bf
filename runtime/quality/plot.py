"""Quality against time as a chart: a point per plan with its interval, and which plans nothing beats in both.

Knows numbers and names only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pictures.charts import BLUE, DARK, GREY, new_figure, plain, save_figure
from .estimates import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_RATIO = 12
"""An axis whose numbers differ by more than this factor is logarithmic."""


@dataclass(frozen=True)
class Point:
    """One plan.

    Attributes:
        name: short; empty for one of a crowd, which is drawn small and without its interval.
        cost, quality: x and y; of both less is better.
    """

    name: str
    cost: float
    quality: Estimate


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other is at least as good as in both and better in one, by rising cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.quality.value)):
        if not found or point.quality.value < found[-1].quality.value:
            found.append(point)
    return found


def overlap(one: Estimate, other: Estimate) -> bool:
    """Whether both have an interval and these have a value in common, so that neither is shown to be better."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high


def undecided(points: Sequence[Point]) -> list[Point]:
    """Named points whose interval overlaps that of a faster one, and that no faster one is clearly better than."""
    found: list[Point] = []
    for point in points:
        faster = [p.quality for p in points if p.name and p.cost <= point.cost and p is not point]
        beaten = any(q.value < point.quality.value and not overlap(q, point.quality) for q in faster)
        if point.name and not beaten and any(overlap(q, point.quality) for q in faster):
            found.append(point)
    return found


def plot_front(path: Path, title: str, points: Sequence[Point], cost: str, quality: str) -> None:
    """Writes a PNG of points with 95 % intervals; those on the front are blue and joined, as far as intervals that do
    not overlap say so. Where they overlap, the slower point is hollow.

    Args:
        points: at least one, all numbers finite.
        cost, quality: what the axes show, with units.

    Raises:
        GtrError: matplotlib is missing.
    """
    open_ones, best = undecided(points), front(points)
    note = "lower is better; 95 % intervals; blue: no other is both faster and better"
    if open_ones:
        note += ";\nhollow: overlaps with a faster one, so neither is shown to be better; more images may tell"
    figure = new_figure(9, 5.6, title, note)
    axes = figure.add_subplot()
    plain(axes, "y")
    axes.set_xlabel(cost, size=10, color=DARK)
    axes.set_ylabel(quality, size=10, color=DARK)
    sure = [point for point in best if point not in open_ones]
    axes.step([p.cost for p in sure], [p.quality.value for p in sure], where="post", color=BLUE, alpha=0.4)
    for point in points:
        low, value, high = point.quality.low, point.quality.value, point.quality.high
        interval = None if low is None or high is None or not point.name else [[value - low], [high - value]]
        axes.errorbar(
            point.cost, value, yerr=interval, fmt="o", markersize=7 if point.name else 4, elinewidth=1.8,
            color=BLUE if point in best or point in open_ones else GREY,
            markerfacecolor="white" if point in open_ones else None,
        )  # fmt: skip
    _scale(axes, "x", [point.cost for point in points])
    _scale(axes, "y", [point.quality.value for point in points])
    _name(axes, sorted((point for point in points if point.name), key=lambda point: point not in best), points)
    save_figure(path, figure)


def _scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Logarithmic with plain numbers where the values differ a lot; else a cost begins at 0."""
    from matplotlib.ticker import LogLocator, NullLocator

    if min(values) > 0 and max(values) / min(values) > _LOG_RATIO:
        axes.set(**{f"{which}scale": "log"})
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    elif which == "x":
        axes.set_xlim(min(0.0, min(values)), 1.12 * max(values) or 1.0)


def _name(axes: Axes, named: Sequence[Point], points: Sequence[Point]) -> None:
    """Names beside their points where there is room; at the last place tried where there is none."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # pyright: ignore[reportAttributeAccessIssue]
    taken: list[Bbox] = []
    for point in points:
        ends = [end for end in (point.quality.low, point.quality.high) if end is not None and point.name]
        place = axes.transData.transform([(point.cost, y) for y in (point.quality.value, *ends)])
        finite = place[[bool(math.isfinite(y)) for _, y in place]]  # an interval down to 0 has no end on a log axis
        taken.append(Bbox([finite.min(axis=0) - 7, finite.max(axis=0) + 7]))
    offsets = [(9, 0), (-9, 0), *((side, up) for up in (14, -14, 26, -26, 38, -38, 50, -50) for side in (6, -6))]
    for point in named:
        note: Any = None
        for across, up in offsets:
            if note is not None:
                note.remove()
            note = axes.annotate(
                point.name, (point.cost, point.quality.value), (across, up), textcoords="offset points", size=10,
                color=DARK, ha="left" if across > 0 else "right", va="center",
            )  # fmt: skip
            note.set_in_layout(False)
            box = note.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and axes.bbox.y0 <= box.y0
            if inside and box.y1 <= axes.bbox.y1 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(note.get_window_extent())
