"""The figures of docs/quality.md, drawn from the lines of quality.jsonl; pictures are made anew from the bundle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from quality_configurations import CONFIGURATIONS

from gtr_deploy.runtime import Pipeline
from gtr_deploy.runtime.commands.plan_options import chosen_plan
from gtr_deploy.runtime.files import atomic_path
from gtr_deploy.runtime.pictures.drawing import BACKGROUND, GAP, MARGIN, TEXT, enlarge, fitted, load_font
from gtr_deploy.runtime.pictures.trace import contact_sheet
from gtr_deploy.runtime.quality.digits import DigitSample, digit_figures, real_digits
from gtr_deploy.runtime.quality.estimates import Estimate
from gtr_deploy.runtime.quality.plot import BEATEN, FRONT, LINE, Axis, Point, front, number, plot_front

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SECONDS = "processor seconds per image"
WORSE = (213, 94, 0)
ROW, NAME, PANEL, FONT = 26, 180, 210, 14

#: File, title, factors.
QUESTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("presets", "The presets", ("preset",)),
    ("steps", "AR steps per stage; the last two with fewer diffusion steps", ("stage steps", "few steps")),
    ("diffusion", "Diffusion steps per token", ("generation diffusion", "reconstruction diffusion")),
    ("timestep", "Largest diffusion timestep kept", ("max timestep",)),
    ("order", "Number of stages K, the colour of the last stage, and the order", ("stages", "parity", "order")),
    ("fts", "Which tokens of the last stage get more diffusion steps", ("fts", "fts at 3 steps")),
    ("guidance", "Guidance and temperature", ("guidance", "temperature")),
)
OFF_THE_CHART = 5.0
"""Frechet distances above this are left out of the pictures against time and FLOPs, whose titles say how many."""

#: Rows of the picture of failures: configuration, what it shows.
FAILURES = ("gtr", "timestep 999", "gtr-compact", "order raster", "steps 2-1-1", "4,2,1 at 10 and 5", "cfg 1.0")


@dataclass(frozen=True)
class Row:
    """One configuration over all its blocks.

    Attributes:
        difference: from ``gtr`` on the same images, by metric; empty for ``gtr``.
        seconds: processor seconds per image, least of the blocks: other processes disturb that one least.
    """

    name: str
    factor: str
    images: int
    figures: Mapping[str, Estimate]
    difference: Mapping[str, Estimate]
    seconds: float
    flops: int


def rows_of(lines: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per configuration, from its line with the most blocks, in the order of CONFIGURATIONS."""
    images = next(line["environment"]["images"] for line in lines if "environment" in line)
    found: list[Row] = []
    for entry in CONFIGURATIONS:
        own = [line for line in lines if line.get("configuration") == entry.name]
        if not own:
            continue
        best = max(own, key=lambda line: len(line["pooled_blocks"]))
        pooled, difference = (
            {name: Estimate(*values) for name, values in best[key].items()} for key in ("pooled", "difference")
        )
        seconds = min(line["cpu_seconds"] for line in own)
        count = images * len(best["pooled_blocks"])
        found.append(Row(entry.name, entry.factor, count, pooled, difference, seconds, best["flops"]))
    return found


def draw(folder: Path, lines: Sequence[Mapping[str, Any]], target: Path = IMAGES) -> None:
    """All figures, into ``target``; prints what the document's tables hold."""
    rows = rows_of(lines)
    images = max(row.images for row in rows)
    # Frechet distances of fewer images are larger: only equal numbers go into one picture.
    full = [row for row in rows if row.images == images]
    what = f"mar-digits, {images} images per plan, one core of a CPU"
    shown = [row for row in full if row.figures["frechet_distance"].value <= OFF_THE_CHART]
    presets = [row for row in shown if row.factor == "preset" or row.name == "steps 4-2-1"]
    points = [Point(row.name, row.seconds, row.figures["frechet_distance"]) for row in presets]
    title = f"Presets (gtr-compact is off the chart) and gtr in 4, 2, 1 AR steps: {what}"
    plot_front(target / "quality.png", title, points, SECONDS, "Frechet distance")
    title = f"{len(shown)} configurations ({len(full) - len(shown)} above {OFF_THE_CHART:g} left out): {what}"
    for name, axis in (("time", SECONDS), ("flops", "GFLOP per image")):
        costs = [row.seconds if name == "time" else row.flops / 1e9 for row in shown]
        points = [Point("", cost, row.figures["frechet_distance"]) for row, cost in zip(shown, costs, strict=True)]
        best = [row for row, point in zip(shown, points, strict=True) if point in front(points)]
        named = [row.name if row in best or row.factor == "preset" else "" for row in shown]
        points = [replace(point, name=name) for point, name in zip(points, named, strict=True)]
        plot_front(target / f"quality-{name}.png", title, points, axis, "Frechet distance")
    base = next(row for row in rows if row.name == "gtr")
    for name, title, factors in QUESTIONS:
        own = [row for row in rows if row.factor in factors and row is not base]
        if own:
            plot_rows(target / f"quality-{name}.png", title, [base, *own])
    pipeline = Pipeline.load(folder, "onnxruntime", 1, provider="cpu")
    draw_failures(target / "quality-failures.png", pipeline)
    draw_mistakes(target / "quality-mistakes.png", pipeline, lines)
    for row in rows:
        print(markdown(row))
    for line in lines:
        if "pair" in line:
            change = Estimate(*line["difference"]["frechet_distance"])
            print(f"{' less '.join(line['pair'])}, {line['images']} images: Frechet distance {_interval(change, '+')}")
    floor = digit_figures(real_sample(images), real_digits())
    print(f"{images} real digits: " + ", ".join(f"{name} {_interval(value)}" for name, value in floor.items()))


def real_sample(count: int) -> DigitSample:
    """Real digits, equally many of each class: what these figures are for a generator that draws from the data."""
    real, rng = real_digits(), np.random.default_rng(0)
    chosen = [rng.choice(np.flatnonzero(real.labels == label), count // 10, replace=False) for label in range(10)]
    grey = np.round(real.pixels[np.concatenate(chosen)].reshape(-1, 8, 8) * 255).astype(np.uint8)
    large = grey.repeat(4, axis=1).repeat(4, axis=2)
    return real.sample(np.repeat(large[..., None], 3, axis=-1), real.labels[np.concatenate(chosen)])


def markdown(row: Row) -> str:
    """A table row: difference of Frechet distance, accuracy, nearest real, diversity, seconds, GFLOP."""
    change = row.difference.get("frechet_distance")
    cells = [
        row.name,
        _interval(row.figures["frechet_distance"]),
        "" if change is None else _interval(change, "+"),
        _share(row.figures["class_accuracy"]),
        *(_interval(row.figures[name]) for name in ("nearest_ratio", "diversity_ratio", "inception_score")),
        f"{row.seconds:.3f}",
        f"{row.flops / 1e9:.2f}",
        str(row.images),
    ]
    return "| " + " | ".join(cells) + " |"


def _interval(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.value:{sign}.2f} ({estimate.low:{sign}.2f} to {estimate.high:{sign}.2f})"


def _share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % ({100 * (estimate.low or 0):.1f} to {100 * (estimate.high or 0):.1f})"


def plot_rows(path: Path, title: str, rows: Sequence[Row]) -> None:
    """A row per configuration: changes of Frechet distance and diversity from ``gtr`` (first row), accuracy, seconds.

    What lies beyond an axis is written as a number at its end.
    """
    font, bold = load_font(FONT), load_font(FONT + 3)
    left = MARGIN + NAME
    seconds = left + 3 * (PANEL + 50)
    size = (seconds + 230, 118 + ROW * len(rows) + 44)
    canvas = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN - 2), fitted(title, bold, size[0] - 2 * MARGIN), TEXT, bold)
    note = "same seeds in all rows; 95 % intervals; orange: worse than gtr beyond the interval"
    pen.text((MARGIN, MARGIN + 24), fitted(note, font, size[0] - 2 * MARGIN), TEXT, font)
    top, bottom = 106, 110 + ROW * len(rows)
    axes = (
        _around_zero(rows, "frechet_distance", 6.0, left),
        _around_zero(rows, "diversity_ratio", 0.3, left + PANEL + 50),
        Axis(80.0, 100.0, left + 2 * (PANEL + 50), left + 2 * (PANEL + 50) + PANEL, False),
    )
    headings = [
        "Frechet distance less gtr's",
        "diversity less gtr's",
        "recognised, %",
        "s per image",
        "GFLOP",
        "images",
    ]
    places = [*(axis.start for axis in axes), seconds, seconds + 95, seconds + 160]
    for heading, x in zip(headings, places, strict=True):
        pen.text((x, top - 34), heading, TEXT, font)
    for axis in axes:
        for tick in axis.ticks():
            pen.line((axis.at(tick), top - 8, axis.at(tick), bottom), BEATEN if tick == 0 else LINE)
            pen.text((axis.at(tick) - font.getlength(number(tick)) / 2, bottom + 4), number(tick), TEXT, font)
    nothing = Estimate(0.0)
    for index, row in enumerate(rows):
        y = top + ROW * index
        pen.text((MARGIN, y), fitted(row.name, font, NAME - 10), TEXT, font)
        change, spread, drop = (
            row.difference.get(name, nothing) for name in ("frechet_distance", "diversity_ratio", "class_accuracy")
        )
        _mark(pen, axes[0], y + 9, change, change.low is not None and change.low > 0, font)
        _mark(pen, axes[1], y + 9, spread, spread.high is not None and spread.high < 0, font)
        share = row.figures["class_accuracy"]
        percent = Estimate(100 * share.value, 100 * (share.low or 0), 100 * (share.high or 0))
        _mark(pen, axes[2], y + 9, percent, drop.high is not None and drop.high < 0, font)
        for text, x in zip((f"{row.seconds:.3f}", f"{row.flops / 1e9:.2f}", str(row.images)), places[3:], strict=True):
            pen.text((x, y), text, TEXT, font)
    with atomic_path(path) as temporary:
        canvas.save(temporary)


def _around_zero(rows: Sequence[Row], name: str, limit: float, start: int) -> Axis:
    """An axis for the changes of a metric; those beyond ``limit`` do not stretch it."""
    changes = [row.difference[name] for row in rows if name in row.difference]
    ends = [end for change in changes if abs(change.value) <= limit for end in (change.low, change.high)]
    return Axis.over([0.0, *(end for end in ends if end is not None)], start, start + PANEL)


def _mark(pen: ImageDraw.ImageDraw, axis: Axis, y: float, estimate: Estimate, worse: bool, font: Any) -> None:
    colour = WORSE if worse else FRONT
    low, high = estimate.low, estimate.high
    if estimate.value > axis.high or estimate.value < axis.low:
        end = axis.end if estimate.value > axis.high else axis.start
        digits = 0 if abs(estimate.value) > 5 else 2
        ends = "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"
        text = f"{estimate.value:.{digits}f}{ends}"
        arrow = f"{text} >" if estimate.value > axis.high else f"< {text}"
        pen.text((end - font.getlength(arrow) if estimate.value > axis.high else end, y - 9), arrow, colour, font)
        return
    if low is not None and high is not None:
        pen.line((max(axis.at(low), axis.start), y, min(axis.at(high), axis.end), y), colour, 2)
    x = axis.at(estimate.value)
    pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)


def draw_failures(path: Path, pipeline: Pipeline, factor: int = 2) -> None:
    """The same ten seeds, 0 to 9 of classes 0 to 9, under each configuration of :data:`FAILURES`."""
    font, side = load_font(FONT), 32 * factor
    canvas = Image.new("RGB", (MARGIN + NAME + 10 * (side + GAP) + MARGIN, 2 * MARGIN + len(FAILURES) * (side + GAP)))
    canvas.paste(BACKGROUND, (0, 0, *canvas.size))
    pen = ImageDraw.Draw(canvas)
    for row, name in enumerate(FAILURES):
        y = MARGIN + row * (side + GAP)
        pen.text((MARGIN, y + side // 2 - 9), name, TEXT, font)
        for column, image in enumerate(_made(pipeline, name, range(10))):
            canvas.paste(enlarge(image, factor), (MARGIN + NAME + column * (side + GAP), y))
    with atomic_path(path) as temporary:
        canvas.save(temporary)


def draw_mistakes(path: Path, pipeline: Pipeline, lines: Iterable[Mapping[str, Any]], name: str = "gtr") -> None:
    """Every picture of one configuration that is not taken for what was asked; nothing where there is none."""
    seeds = [seed for line in lines if line.get("configuration") == name for seed in line["mistaken"]]
    if not seeds:
        return
    images = _made(pipeline, name, seeds)
    posteriors = real_digits().sample(images, [seed % 10 for seed in seeds]).posteriors
    captions = [f"{seed % 10} taken for {p.argmax()}" for seed, p in zip(seeds, posteriors, strict=True)]
    title = f"{name}: pictures not taken for what was asked"
    with atomic_path(path) as temporary:
        contact_sheet(images, captions, 6, title).save(temporary)


def _made(pipeline: Pipeline, name: str, seeds: Iterable[int]) -> np.ndarray:
    entry = next(entry for entry in CONFIGURATIONS if entry.name == name)
    plan = chosen_plan(entry.preset, entry.overrides, pipeline.architecture, pipeline.plan_defaults)
    seeds = list(seeds)
    return pipeline.generate([seed % 10 for seed in seeds], seeds, plan, batch_size=len(seeds)).images
