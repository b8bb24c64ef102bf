"""The sensitivity table as a chart: one bar per layer, worst on top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..runtime.pictures.charts import BLUE, DARK, new_figure, plain, save_figure

MOST = 30
"""Bars of one chart."""


def plot_bars(path: Path, title: str, bars: Sequence[tuple[str, float]]) -> None:
    """Writes a PNG of horizontal bars on a logarithmic axis: at most the 30 largest, the largest on top.

    Args:
        bars: (name, value of at least 0); 0 has no bar, infinity a full one.

    Raises:
        GtrError: matplotlib is missing.
    """
    shown = sorted(bars, key=lambda bar: -bar[1])[:MOST]
    note = f"the {len(shown)} worst of {len(bars)} layers" if len(shown) < len(bars) else ""
    figure = new_figure(9, 1.2 + 0.24 * len(shown), title, note)
    axes = figure.add_subplot()
    plain(axes, "x")
    axes.set_xscale("log")
    positive = [value for _, value in shown if 0 < value < math.inf] or [0.1, 1.0]
    low, high = 10.0 ** math.floor(math.log10(min(positive))), 1.6 * max(positive)
    low = low if low < min(positive) else low / 10
    rows = range(len(shown))
    axes.barh(rows, [min(value, high) for _, value in shown], height=0.7, color=BLUE)
    for row, (_, value) in zip(rows, shown, strict=True):
        end = (min(max(value, low), high), row)
        axes.annotate(f"{value:.2g}", end, (4, 0), textcoords="offset points", va="center", size=9.5, color=DARK)
    axes.set_yticks(rows, [name for name, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(low, high * 1.4)
    axes.xaxis.set_major_formatter("{x:g}")
    save_figure(path, figure)
