"""The figures of docs/quality.md, drawn from the lines of results/quality.jsonl; pictures are made from the bundle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality_configurations import CONFIGURATIONS

from gtr_deploy.runtime import Pipeline
from gtr_deploy.runtime.files import atomic_path
from gtr_deploy.runtime.pictures.charts import BLUE, DARK, GREY, VERMILION, new_figure, plain, save_figure
from gtr_deploy.runtime.pictures.sheet import contact_sheet
from gtr_deploy.runtime.quality.digits import DigitSample, digit_figures, real_digits
from gtr_deploy.runtime.quality.estimates import Estimate
from gtr_deploy.runtime.quality.plot import Point, plot_front
from gtr_deploy.runtime.sampling.named import named_plan

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SHOWN = ("mar", "disa", "halton", "gtr", "gtr-fast", "steps 4-2-1")
"""Against time: the presets but gtr-compact, which is far off, and gtr in 4, 2, 1 AR steps."""

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
#: What a panel shows: metric, heading, limit beyond which a change does not stretch the axis, whether less is better.
CHANGES = (
    ("frechet_distance", "Frechet distance less gtr's", 6.0, True),
    ("diversity_ratio", "diversity less gtr's", 0.3, False),
)

#: Rows of the picture of failures.
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


def draw_charts(lines: Sequence[Mapping[str, Any]], target: Path = IMAGES) -> None:
    """All charts, into ``target``."""
    rows = rows_of(lines)
    presets = [row for row in rows if row.name in SHOWN]
    points = [Point(row.name, row.seconds, row.figures["frechet_distance"]) for row in presets]
    title = f"mar-digits, {presets[0].images} images per plan, one core of a CPU; gtr-compact is off the chart"
    plot_front(target / "quality.png", title, points, "processor seconds per image", "Frechet distance")
    base = next(row for row in rows if row.name == "gtr")
    for name, title, factors in QUESTIONS:
        if own := [row for row in rows if row.factor in factors and row is not base]:
            plot_rows(target / f"quality-{name}.png", title, [base, *own])


def plot_rows(path: Path, title: str, rows: Sequence[Row]) -> None:
    """A row per configuration: changes of Frechet distance and diversity from ``gtr`` (first row), accuracy, seconds.

    What lies beyond an axis is written as a number at its end.
    """
    note = "same seeds in all rows; 95 % intervals; orange: worse than gtr beyond the interval"
    figure = new_figure(10.5, 1.4 + 0.27 * len(rows), title, note)
    panels = figure.subplots(1, 3, sharey=True, gridspec_kw={"wspace": 0.06})
    places = range(len(rows))
    for axes, (metric, heading, limit, less_is_better) in zip(panels, CHANGES, strict=False):
        changes = [row.difference.get(metric, Estimate(0.0)) for row in rows]
        drawn = [change for change in changes if abs(change.value) <= limit]
        ends = [end for change in drawn for end in (change.low, change.high) if end is not None] or [0.0]
        room = 0.06 * (max(0.0, *ends) - min(0.0, *ends)) or 1.0
        axes.set_xlim(min(0.0, *ends) - room, max(0.0, *ends) + room)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_title(heading, size=10, color=DARK)
        for place, change in zip(places, changes, strict=True):
            worse = change.low if less_is_better else change.high
            bad = worse is not None and (worse > 0 if less_is_better else worse < 0)
            _mark(axes, place, change, VERMILION if bad else BLUE)
    axes = panels[2]
    axes.set_xlim(79, 101)
    axes.set_title("recognised, %", size=10, color=DARK)
    for place, row in zip(places, rows, strict=True):
        drop, share = row.difference.get("class_accuracy", Estimate(0.0)), row.figures["class_accuracy"]
        percent = Estimate(*(100 * (end or 0.0) for end in (share.value, share.low, share.high)))
        _mark(axes, place, percent, VERMILION if drop.high is not None and drop.high < 0 else BLUE)
        text = f"{row.seconds:.3f} s" + (f"  ({row.images} images)" if row.images != rows[0].images else "")
        axes.annotate(text, (1.03, place), xycoords=("axes fraction", "data"), va="center", size=10, color=DARK)
    for axes in panels:
        plain(axes, "both")
        axes.locator_params(axis="x", nbins=5)
    panels[0].set_yticks(places, [row.name for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    save_figure(path, figure)


def _mark(axes: Any, place: int, estimate: Estimate, colour: str) -> None:
    low, high = axes.get_xlim()
    if low <= estimate.value <= high:
        ends = [estimate.value if end is None else end for end in (estimate.low, estimate.high)]
        axes.plot(np.clip(ends, low, high), [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(estimate.value, place, "o", color=colour, markersize=6)
        return
    beyond = estimate.value > high
    text = f"{estimate.value:.3g} →" if beyond else f"← {estimate.value:.3g}"
    place_of = (0.99 if beyond else 0.01, place)
    side = "right" if beyond else "left"
    axes.annotate(text, place_of, xycoords=("axes fraction", "data"), ha=side, va="center", size=9.5, color=colour)


def draw_pictures(folder: Path, lines: Sequence[Mapping[str, Any]], target: Path = IMAGES) -> None:
    """Failures and mistakes, made anew from the bundle in ``folder``."""
    with Pipeline.load(folder, backend="onnxruntime", threads=1) as pipeline:
        draw_failures(target / "quality-failures.png", pipeline)
        draw_mistakes(target / "quality-mistakes.png", pipeline, lines)


def draw_failures(path: Path, pipeline: Pipeline) -> None:
    """The same ten seeds, 0 to 9 of classes 0 to 9, under each configuration of :data:`FAILURES`."""
    strips = []
    for name in FAILURES:
        made = np.pad(_made(pipeline, name, range(10)), ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
        strips.append(np.concatenate(list(made), axis=1))
    figure = new_figure(9, 0.6 + 0.78 * len(FAILURES), "The same ten seeds under settings that go wrong")
    axes = figure.add_subplot()
    axes.imshow(np.concatenate(strips), interpolation="nearest")
    axes.set_axis_off()
    for index, name in enumerate(FAILURES):
        height = len(strips[0])
        axes.annotate(
            name, (-4, (index + 0.5) * height), ha="right", va="center", size=10, color=DARK, annotation_clip=False
        )
    save_figure(path, figure)


def draw_mistakes(path: Path, pipeline: Pipeline, lines: Iterable[Mapping[str, Any]], name: str = "gtr") -> None:
    """Every picture of one configuration that is not taken for what was asked; nothing where there is none."""
    seeds = [seed for line in lines if line.get("configuration") == name for seed in line["mistaken"]]
    if not seeds:
        return
    images = _made(pipeline, name, seeds)
    posteriors = real_digits().sample(images, [seed % 10 for seed in seeds]).posteriors
    captions = [f"{seed % 10} taken for {p.argmax()}" for seed, p in zip(seeds, posteriors, strict=True)]
    with atomic_path(path) as temporary:
        contact_sheet(images, captions, 6, f"{name}: pictures not taken for what was asked").save(temporary)


def _made(pipeline: Pipeline, name: str, seeds: Iterable[int]) -> NDArray[np.uint8]:
    entry = next(entry for entry in CONFIGURATIONS if entry.name == name)
    plan = named_plan(entry.preset, pipeline.architecture, pipeline.plan_defaults, entry.overrides)
    seeds = list(seeds)
    return pipeline.generate([seed % 10 for seed in seeds], seeds=seeds, plan=plan, batch_size=len(seeds)).images


def tables(lines: Sequence[Mapping[str, Any]]) -> str:
    """What the document's tables hold: a line per configuration and per pair, and real digits for comparison."""
    rows = rows_of(lines)
    found = [_table_row(row) for row in rows]
    for line in lines:
        if "pair" in line:
            change = Estimate(*line["difference"]["frechet_distance"])
            found.append(f"{' less '.join(line['pair'])}, {line['images']} images: {_interval(change, '+')}")
    images = max(row.images for row in rows)
    floor = digit_figures(_real_sample(images), real_digits())
    found.append(f"{images} real digits: " + ", ".join(f"{name} {_interval(value)}" for name, value in floor.items()))
    return "\n".join(found)


def _real_sample(count: int) -> DigitSample:
    """Real digits, equally many of each class: what these figures are for a generator that draws from the data."""
    real, rng = real_digits(), np.random.default_rng(0)
    chosen = [rng.choice(np.flatnonzero(real.labels == label), count // 10, replace=False) for label in range(10)]
    grey = np.round(real.pixels[np.concatenate(chosen)].reshape(-1, 8, 8) * 255).astype(np.uint8)
    large = grey.repeat(4, axis=1).repeat(4, axis=2)
    return real.sample(np.repeat(large[..., None], 3, axis=-1), real.labels[np.concatenate(chosen)])


def _table_row(row: Row) -> str:
    """Frechet distance and its change, accuracy, nearest real, diversity, inception score, seconds, GFLOP, images."""
    change, share = row.difference.get("frechet_distance"), row.figures["class_accuracy"]
    cells = [
        row.name,
        _interval(row.figures["frechet_distance"]),
        "" if change is None else _interval(change, "+"),
        f"{100 * share.value:.1f} % ({100 * (share.low or 0):.1f} to {100 * (share.high or 0):.1f})",
        *(_interval(row.figures[name]) for name in ("nearest_ratio", "diversity_ratio", "inception_score")),
        f"{row.seconds:.3f}",
        f"{row.flops / 1e9:.2f}",
        str(row.images),
    ]
    return "| " + " | ".join(cells) + " |"


def _interval(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.value:{sign}.2f} ({estimate.low:{sign}.2f} to {estimate.high:{sign}.2f})"
