"""Plots of measured points: stacked horizontal bars with a text at their ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compare_contenders import ORIGINAL, REFERENCES
from compare_records import Record
from compare_summary import Points
from PIL import Image, ImageDraw

from gtr_deploy.runtime.files import atomic_path
from gtr_deploy.runtime.pictures.drawing import BACKGROUND, MARGIN, TEXT, Colour, fitted, load_font
from gtr_deploy.runtime.sampling.plan import PRESETS

COLOURS: dict[str, Colour] = {
    "backbone": (86, 132, 190),
    "head": (214, 148, 72),
    "host": (96, 158, 108),
    "detail": (150, 120, 176),
    "floor": (86, 132, 190),
    "above it": (214, 148, 72),
}
OTHER: tuple[Colour, ...] = ((150, 150, 146), (188, 96, 104), (120, 170, 178), (176, 160, 92), (128, 116, 150))

_LINE: Colour = (206, 206, 202)
_ROW, _NAMES, _BARS, _NOTES, _FONT = 24, 300, 520, 190, 13


@dataclass(frozen=True)
class Bar:
    """One row.

    Attributes:
        name: left of it.
        parts: (kind, length) from left to right.
        note: right of it.
    """

    name: str
    parts: Sequence[tuple[str, float]]
    note: str


def plot_stacked(path: Path, title: str, unit: str, bars: Sequence[Bar], mark: float | None = None) -> None:
    """Writes a PNG of stacked bars on a linear axis that begins at 0.

    Args:
        title, unit: of the plot and of its axis.
        bars: from top to bottom.
        mark: where a line is drawn over all bars.
    """
    font = load_font(_FONT)
    kinds = list(dict.fromkeys(kind for bar in bars for kind, _ in bar.parts))
    colours = _colours(kinds)
    top = 3 * MARGIN + 2 * _ROW
    size = (2 * MARGIN + _NAMES + _BARS + _NOTES, top + _ROW * len(bars) + MARGIN + _ROW)
    canvas = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    heading = load_font(_FONT + 2)
    pen.text((MARGIN, MARGIN - 4), fitted(title, heading, size[0] - 2 * MARGIN), TEXT, heading)
    x = MARGIN
    for kind in kinds:
        pen.rectangle((x, MARGIN + _ROW + 2, x + 12, MARGIN + _ROW + 14), colours[kind])
        pen.text((x + 18, MARGIN + _ROW), kind, TEXT, font)
        x += 36 + round(font.getlength(kind))
    longest = max((sum(length for _, length in bar.parts) for bar in bars), default=1.0)
    longest = max(longest, mark or 0.0) or 1.0
    step = nice_step(longest)
    left, bottom = MARGIN + _NAMES, top + _ROW * len(bars)
    scale = _BARS / longest
    for index in range(int(longest / step + 1e-9) + 1):
        x = left + round(index * step * scale)
        pen.line((x, top - 4, x, bottom), _LINE)
        label = f"{index * step:g}" + (f" {unit}" if index == 0 else "")
        pen.text((x - (0 if index == 0 else font.getlength(label) / 2), bottom + 4), label, TEXT, font)
    for row, bar in enumerate(bars):
        y, start = top + row * _ROW, 0.0
        pen.text((MARGIN, y + 3), fitted(bar.name, font, _NAMES - 12), TEXT, font)
        for kind, length in bar.parts:
            first, last = left + round(start * scale), left + round((start + length) * scale)
            if last > first:
                pen.rectangle((first, y + 4, last - 1, y + _ROW - 5), colours[kind])
            start += length
        end = left + round(start * scale) + 6
        pen.text((end, y + 3), fitted(bar.note, font, size[0] - MARGIN - end), TEXT, font)
    if mark is not None:
        pen.line((left + round(mark * scale), top - 6, left + round(mark * scale), bottom + 2), TEXT)
    with atomic_path(path) as temporary:
        canvas.save(temporary)


def _colours(kinds: Sequence[str]) -> dict[str, Colour]:
    spare = iter(OTHER * (1 + len(kinds) // len(OTHER)))
    return {kind: COLOURS.get(kind) or next(spare) for kind in kinds}


def nice_step(longest: float) -> float:
    """1, 2 or 5 times a power of ten, so that about five fit into ``longest``."""
    power = 10.0 ** math.floor(math.log10(longest / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if longest / (factor * power) <= 6)


def plot_points(everything: Sequence[Points], folder: Path) -> list[Path]:
    """Latency with ratios, shares per part, and the gap to the floor, all of batch 1: one PNG each.

    Args:
        everything: each model is shown with the first of these that has it.

    Returns:
        What was written: ``performance-latency.png`` of the largest model that the original ran, or else of
        the largest with a reference; ``-parts`` and ``-roofline`` of all models.
    """
    main = everything[0]
    if not main.ran:
        return []
    references = {model: found["backend"] for model in main.models if (found := main.reference(model)) is not None}
    originals = [model for model, backend in references.items() if backend == ORIGINAL]
    model = max(originals or references or main.models, key=main.work)
    cpu = main.ran[-1]["environment"]["cpu"]
    shown: list[tuple[Points, Record]] = []
    for points in everything:
        have = {record["model"] for _, record in shown}
        for name in points.models:
            if name not in have:
                shown += [(points, record) for record in _of(points, name) if record["backend"] not in REFERENCES]
    shown.sort(key=lambda pair: everything[0].work(pair[1]["model"]) or pair[0].work(pair[1]["model"]))
    written = []

    def write(name: str, title: str, unit: str, bars: Sequence[Bar], mark: float | None = None) -> None:
        path = folder / f"performance-{name}.png"
        plot_stacked(path, title, unit, bars, mark)
        written.append(path)

    def full_name(points: Points, record: Record) -> str:
        threads = "" if points is main else f" ({points.threads})"
        return f"{record['model']} {_name(record)}{threads}"

    where = f"{cpu}, {main.threads}"
    write(
        "latency",
        f"{model}: seconds of one image without the VAE decoder ({where}); times as fast as the reference",
        "s",
        [Bar(_name(r), list(time_parts(r).items()), _latency_note(main, r)) for r in _of(main, model)],
    )
    write(
        "parts",
        f"Share of the time per part, batch 1 ({where})",
        "%",
        [
            Bar(full_name(p, r), [(k, 100 * v / r["seconds"]) for k, v in time_parts(r).items()],
                f"host {r['parts']['host'] / r['seconds']:.1%}")
            for p, r in shown
        ],
    )  # fmt: skip
    large = [(points, record) for points, record in shown if points.floor(record) is not None]
    if large:
        title = f"Time over floor = max(FLOPs / matrix rate, weights / memory rate); {main.rates.text}"
        write("roofline", title, "", [_gap(full_name(p, r), p, r) for p, r in large], 1.0)
    return written


def _gap(name: str, points: Points, record: Record) -> Bar:
    gap = record["seconds"] / (points.floor(record) or math.inf)
    note = f"{gap:.2f}" if record["precision"] == "fp32" else f"{gap:.2f} (at the fp32 rate)"
    return Bar(name, [("floor", min(1.0, gap)), ("above it", max(0.0, gap - 1.0))], note)


def _of(points: Points, model: str) -> list[Record]:
    """Batch 1, plans in the order of the presets, slowest contender first."""
    plans = [name for name in PRESETS if points.find(model, name)]
    found: list[Record] = []
    key: Callable[[Record], float] = lambda record: -record["seconds"]  # noqa: E731
    for plan in plans:
        found += sorted(points.find(model, plan), key=key)
    return found


def time_parts(record: Record) -> dict[str, float]:
    """Seconds of backbone, head and host."""
    return {part: record["parts"][part] for part in ("backbone", "head", "host")}


def _name(record: Record) -> str:
    return f"{record['plan']}  {record['backend']} {record['precision']}"


def _latency_note(points: Points, record: Record) -> str:
    ratio = points.ratio(record)
    return f"{record['seconds']:.3g} s" + ("" if ratio is None else f"  ({ratio:.1f} x)")
