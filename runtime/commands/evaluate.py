"""gtr-run evaluate: what a plan costs in quality, in numbers with intervals."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import GtrError, UsageError
from ..sampling.named import named_plan, split_plans
from .backend_options import backend_options, load_pipeline
from .console import Reporter, echo, print_json, print_table
from .plan_options import plan_options
from .request_options import image_settings
from .stop import if_stopped

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..backends.row import BackendOptions
    from ..bundle.reader import Bundle
    from ..models.conditioning import Request
    from ..pipeline import Pipeline
    from ..quality.estimates import Estimate, Measure, Tally
    from ..sampling.plan import SamplingPlan

HEADINGS = {
    "frechet_distance": "Frechet distance",
    "inception_score": "inception score",
    "class_accuracy": "accuracy",
    "nearest_ratio": "nearest real",
    "diversity_ratio": "diversity",
}


_MOST_PAIRS = 6
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@dataclass(frozen=True)
class Evaluated:
    """What one plan's pictures are worth.

    Attributes:
        tally: what is kept of them, for comparison with another plan's.
        seconds: per image, decoding included; None if all were read from ``--save-images``.
        generated: images that were made now and not read.
    """

    plan: SamplingPlan
    tally: Tally
    figures: Mapping[str, Estimate]
    seconds: float | None
    generated: int

    def to_json(self, difference: Mapping[str, Estimate]) -> dict[str, Any]:
        """Its figures, and what it has more or less than another plan on the same seeds."""
        return {
            "plan": self.plan.settings.to_json(),
            "ar_steps": len(self.plan.steps),
            "head_calls": self.plan.head_calls,
            "flops": self.plan.flops,
            "seconds_per_image": self.seconds,
            "generated": self.generated,
            "figures": {name: estimate.to_json() for name, estimate in self.figures.items()},
            "difference": {name: estimate.to_json() for name, estimate in difference.items()},
        }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@plan_options(multiple=True)
@click.option("--images", type=click.IntRange(2, 1_000_000), default=1000, show_default=True, help="Images per plan.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Image n gets seed + n.")
@click.option("--batch-size", type=click.IntRange(1, 4096), help="Images per batch (the bundle's max_batch).")
@click.option(
    "--reference", type=_FILE, help="NPZ with mu and sigma of real pictures' Inception features; digits need none."
)
@click.option("--inception-weights", type=_FILE, help="torch-fidelity's weights file, where it cannot be downloaded.")
@click.option(
    "--save-images",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the PNGs; what is there already is not made again.",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="PNG: Frechet distance against time.")
@backend_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def evaluate(
    bundle: Path,
    plan: str,
    overrides: Mapping[str, Any],
    images: int,
    seed: int,
    batch_size: int | None,
    reference: Path | None,
    inception_weights: Path | None,
    save_images: Path | None,
    plot: Path | None,
    engine: BackendOptions,
    as_json: bool,
) -> None:
    """Measure picture quality per plan: Frechet distance, inception score, and seconds per image.

    Images are class-balanced: image n has class n modulo the number of classes, and the same seed under every plan.

    Digits are compared with the 1,797 real ones in the package, and also counted: the share that a classifier takes for
    the digit asked for; the distance to the nearest real digit and the diversity within a class, both relative to real
    digits (1 is what these have; a copier's nearest is 0).

    ImageNet models: FID against --reference (ADM's statistics) and Inception score, with `pip install
    'gtr-deploy[evaluate]'`. The published protocol is --images 50000, 50 of each class, EMA weights, 8-bit PNGs; use
    --save-images, so that an interrupted run goes on where it stopped. FIDs of fewer images are larger: compare only
    equal numbers.
    """
    from ..bundle.reader import Bundle
    from ..pictures.charts import checked_target
    from ..quality.plot import Point, plot_front

    if plot is not None:
        checked_target(plot)
    opened = Bundle.load(bundle)
    opened.check_decoder("evaluate")
    architecture = opened.architecture
    names = split_plans(plan)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--plans: {', '.join(twice)} stands there twice")
    plans = [named_plan(name, architecture, opened.plan_defaults, overrides) for name in names]
    reporter = Reporter(quiet=as_json)
    measure = open_measure(opened, reference, inception_weights, engine)
    requests = opened.conditioner.samples(images)
    kinds = len({str(request) for request in requests})
    if first := images % kinds:
        reporter.say(f"{images} images over {kinds} classes: the first {first} get one more")
    pipeline = click.get_current_context().with_resource(load_pipeline(opened, engine, reporter))
    batch = batch_size or min(images, opened.max_batch)
    results: list[Evaluated] = []
    kept = "nothing is kept; with --save-images FOLDER the same command goes on where it stopped"
    if save_images is not None:
        kept = f"finished images are in {save_images}; the same command goes on from there"
    with if_stopped(kept):
        for name, resolved in zip(names, plans, strict=True):
            folder = None if save_images is None else save_images / name
            job = _Job(opened, pipeline, resolved, requests, seed, batch, folder)
            results.append(_evaluated(job, measure, reporter))
    differences = [{} if result is results[0] else result.tally.less(results[0].tally) for result in results]
    timed = [(result, result.seconds) for result in results if result.seconds is not None]
    if as_json:
        print_json(
            {
                "model": architecture.name,
                "precision": opened.precision,
                "backend": pipeline.backend.name,
                "backend_why": pipeline.backend_why,
                "images": images,
                "seed": seed,
                "batch_size": batch,
                "features": measure.features,
                "reference": measure.reference,
                "plans": [result.to_json(own) for result, own in zip(results, differences, strict=True)],
                "plot": str(plot) if plot and timed else None,
            }
        )
    else:
        _print(results, differences, f"{architecture.name}, {opened.precision}, {images} images, {measure.reference}")
    if plot is not None and timed:  # last: a disk that is full costs the plot alone
        points = [Point(one.plan.settings.name, cost, one.figures["frechet_distance"]) for one, cost in timed]
        title = f"{architecture.name}, {images} images, {pipeline.backend.name}"
        plot_front(plot, title, points, "seconds per image", "Frechet distance")
        if not as_json:
            echo(f"plot: {plot}")
    if plot is not None and not timed:
        raise GtrError("--plot needs times: every image was read from --save-images, and none was made")


def open_measure(bundle: Bundle, reference: Path | None, weights: Path | None, engine: BackendOptions) -> Measure:
    """The feature space that suits a model's pictures: the real digits' where its classes are the digits, else
    Inception's.

    Raises:
        UsageError: an option is missing or has no place here.
        GtrError: a file or a library is not what it should be.
    """
    from ..quality.digits import DigitsMeasure

    architecture = bundle.architecture
    if DigitsMeasure.suits(bundle.conditioner):
        for option, value in (("--reference", reference), ("--inception-weights", weights)):
            if value is not None:
                raise UsageError(f"{option} is for ImageNet models; {architecture.name} is compared with real digits")
        if any(side % 8 for side in architecture.image_size):
            height, width = architecture.image_size
            raise UsageError(f"{architecture.name} makes {height}x{width} pictures; digits are compared as 8x8 pixels")
        return DigitsMeasure()
    if reference is None:
        raise UsageError(
            f"{architecture.name}: give --reference FILE, the statistics of real pictures "
            "(npz with mu and sigma; for ImageNet fid_stats/adm_in256_stats.npz of the MAR repository)"
        )
    from ..quality.inception import InceptionMeasure

    device = {"auto": None, "cuda": f"cuda:{engine.device}"}.get(engine.provider, engine.provider)
    return InceptionMeasure(reference, weights, device)


@dataclass(frozen=True)
class _Job:
    bundle: Bundle
    pipeline: Pipeline
    plan: SamplingPlan
    requests: list[Request]
    seed: int
    batch: int
    folder: Path | None


def _evaluated(job: _Job, measure: Measure, reporter: Reporter) -> Evaluated:
    images = len(job.requests)
    tally, seconds, generated, done = measure.tally(images), 0.0, 0, 0
    with reporter.bar(f"{images} images, plan {job.plan.settings.name}", images, "images") as bar:
        for pictures, requests, spent in _batches(job):
            tally.add(pictures, requests)
            done += len(requests)
            if spent is not None:
                seconds, generated = seconds + spent, generated + len(requests)
            bar.to(done)
    return Evaluated(job.plan, tally, tally.figures(), seconds / generated if generated else None, generated)


def _batches(job: _Job) -> Iterator[tuple[NDArray[np.uint8], list[Request], float | None]]:
    """Pictures, what they were asked to be, and the seconds they took to make; None if they were read."""
    from ..pictures.png import save_png

    warm = False
    for start in range(0, len(job.requests), job.batch):
        requests = job.requests[start : start + job.batch]
        seeds = list(range(job.seed + start, job.seed + start + len(requests)))
        files: dict[Path, dict[str, Any]] = {}
        if job.folder is not None:
            for index, (request, seed) in enumerate(zip(requests, seeds, strict=True), start):
                files[job.folder / f"{index:06d}.png"] = _settings(job, request, seed)
            pictures = _read(files)
            if pictures is not None:
                yield pictures, requests, None
                continue
            job.folder.mkdir(parents=True, exist_ok=True)
        if not warm:
            job.pipeline.warm_up(job.plan, job.batch)
            warm = True
        begin = time.perf_counter()
        made = job.pipeline.generate(requests, seeds, job.plan, batch_size=job.batch)
        spent = time.perf_counter() - begin
        if files:
            for (file, settings), image in zip(files.items(), made.images, strict=True):
                save_png(file, image, settings)
        yield made.images, requests, spent


def _settings(job: _Job, request: Request, seed: int) -> dict[str, Any]:
    return image_settings(job.bundle, job.pipeline.backend.name, request, seed, job.plan)


def _read(files: Mapping[Path, Mapping[str, Any]]) -> NDArray[np.uint8] | None:
    """The batch as it was saved, from file to settings; None unless every image is there.

    Raises:
        GtrError: an image of another plan, seed or bundle lies there.
    """
    import numpy as np

    from ..pictures.png import read_pixels, read_settings

    if not all(file.is_file() for file in files):
        return None
    pictures = []
    for file, wanted in files.items():
        found = read_settings(file)
        for key, value in wanted.items():
            if found.get(key) != value:
                again = "give --save-images another folder, or empty that one"
                raise GtrError(f"{file} was made with another {key}; {again}")
        pictures.append(read_pixels(file))
    return np.stack(pictures)


def _print(results: Sequence[Evaluated], differences: Sequence[Mapping[str, Estimate]], title: str) -> None:
    """A line per figure and plan: what is compared stands below each other, and fits a terminal."""
    rows: list[list[str]] = []
    for name, heading in HEADINGS.items():
        for result, own in zip(results, differences, strict=True):
            if name in result.figures:
                cells = _cells(name, result.figures[name])
                rows.append([heading, result.plan.settings.name, *cells, " ".join(_cells(name, own.get(name), "+"))])
    for result in results:
        if result.seconds is not None:
            rows.append(["s per image", result.plan.settings.name, f"{result.seconds:.3f}", "", ""])
    rows += [["GFLOP", result.plan.settings.name, f"{result.plan.flops / 1e9:.2f}", "", ""] for result in results]
    for row, before in reversed(list(itertools.pairwise(rows))):
        if row[0] == before[0]:
            before[0] = ""
    columns = ["", "plan", "value", "95 % interval", f"difference from {results[0].plan.settings.name}, image by image"]
    shown = len(columns) if any(differences) else -1
    print_table(columns[:shown], [row[:shown] for row in rows], title=title)
    if pairs := _undecided(results):
        which = ", ".join(pairs[:_MOST_PAIRS]) + (f" and {len(pairs) - _MOST_PAIRS} more" * (len(pairs) > _MOST_PAIRS))
        echo(f"intervals of the Frechet distance overlap: {which}; on these numbers alone none is the better one")


def _undecided(results: Sequence[Evaluated]) -> list[str]:
    """The pairs of plans that their Frechet distances do not tell apart."""
    from ..quality.plot import overlap

    name = "frechet_distance"
    return [
        f"{one.plan.settings.name} and {other.plan.settings.name}"
        for one, other in itertools.combinations(results, 2)
        if overlap(one.figures[name], other.figures[name])
    ]


def _cells(name: str, estimate: Estimate | None, sign: str = "") -> tuple[str, str]:
    """``3.97`` and ``3.08 to 4.87``, or ``(+0.08 to +1.87)`` of a signed one; a share as a percentage."""
    if estimate is None:
        return "", ""

    def text(value: float) -> str:
        return f"{value:{sign}.1%}" if name == "class_accuracy" else f"{value:{sign}.2f}"

    if estimate.low is None or estimate.high is None:
        return text(estimate.value), ""
    interval = f"{text(estimate.low)} to {text(estimate.high)}"
    return text(estimate.value), f"({interval})" if sign else interval
