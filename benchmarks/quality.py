"""What each setting of a plan costs in quality, on mar-digits: one factor at a time around the preset ``gtr``.

    gtr-export build --model mar-digits --out bundles/mar-digits
    python benchmarks/quality.py bundles/mar-digits          # 70 minutes on one core; goes on where it stopped
    python benchmarks/quality.py bundles/mar-digits --plot   # the figures of docs/quality.md, from the results

Every configuration makes the same images: same seeds, same classes. Seeds go block by block, so that after each block
all configurations have equally many images. A line of results/quality.jsonl is one configuration in one block, with
its figures over all blocks so far and its differences from ``gtr`` on the same images.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from contenders import stopwatch
from quality_configurations import CONFIGURATIONS, FURTHER, PAIRS, Configuration
from records import append_record, cpu_details

from gtr_deploy.runtime import Bundle, Pipeline, UsageError
from gtr_deploy.runtime.files import atomic_path, cache_dir
from gtr_deploy.runtime.quality.digits import DigitSample, digit_differences, digit_figures, real_digits
from gtr_deploy.runtime.quality.estimates import Estimate
from gtr_deploy.runtime.sampling.named import named_plan
from gtr_deploy.runtime.sampling.plan import SamplingPlan

BASE = "gtr"
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--images", default=100, show_default=True, help="Images of a block, class-balanced.")
@click.option("--blocks", default=3, show_default=True, help="Blocks of seeds.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--pictures", type=click.Path(path_type=Path), help="Where made images are kept (the user's cache).")
@click.option("--threads", default=1, show_default=True)
@click.option(
    "--only", type=click.Choice(sorted(FURTHER)), help="One of the further sweeps, into --results of its own."
)
@click.option("--plot", is_flag=True, help="Draws the figures of docs/quality.md from --results; nothing is measured.")
def main(
    folder: Path,
    images: int,
    blocks: int,
    results: Path,
    pictures: Path | None,
    threads: int,
    only: str | None,
    plot: bool,
) -> None:
    """Measures every configuration in every block; what --results holds already is skipped."""
    if plot:
        from quality_figures import draw_charts, draw_pictures, tables

        draw_charts(read_lines(results))
        draw_pictures(folder, read_lines(results))
        print(tables(read_lines(results)))
        return
    bundle = Bundle.load(folder)
    digest, entries = bundle.digest, CONFIGURATIONS if only is None else FURTHER[only]
    cpu, flags = cpu_details()
    environment = {
        "model": bundle.architecture.name, "precision": bundle.precision, "bundle": digest, "images": images,
        "threads": threads, "cpu": cpu, "instructions": flags, "python": platform.python_version(),
        **{name: version(name) for name in ("gtr-deploy", "numpy", "onnxruntime")},
    }  # fmt: skip
    lines = read_lines(results)
    known = [line["environment"] for line in lines if "environment" in line]
    if any(other["bundle"] != digest or other["images"] != images for other in known):
        raise UsageError(f"{results} was measured with another bundle or --images; name another file with --results")
    if environment not in known:
        append_record(results, {"environment": environment})
    pictures = pictures or cache_dir() / "quality" / f"{digest[:12]}-{images}"
    done = {(line["block"], line["configuration"]) for line in lines if "configuration" in line}
    pipeline = Pipeline.load(bundle, backend="onnxruntime", threads=threads)
    plans = {
        entry.name: named_plan(entry.preset, bundle.architecture, bundle.plan_defaults, entry.overrides)
        for entry in entries
    }
    work = [
        (block, entry)
        for block in range(blocks)
        for entry in entries
        if (block, entry.name) not in done and not (entry.once and block)
    ]
    left = float(sum(plans[entry.name].flops for _, entry in work))
    start, spent = time.perf_counter(), 0.0
    for number, (block, entry) in enumerate(work, 1):
        plan = plans[entry.name]
        line = measured(pipeline, entry, plan, block, images, pictures)
        append_record(results, line)
        left, spent = left - plan.flops, spent + plan.flops
        minutes = (time.perf_counter() - start) / spent * left / 60
        figures = line["figures"]
        print(
            f"{number}/{len(work)} block {block} {entry.name}: accuracy {figures['class_accuracy']:.1%}, "
            f"Frechet {figures['frechet_distance']:.2f}, {line['cpu_seconds']:.3f} s per image; "
            f"about {minutes:.0f} min left",
            flush=True,
        )
    compared = {(*line["pair"], line["images"]) for line in lines if "pair" in line}
    for first, second in PAIRS:
        line = paired(first, second, range(blocks), images, pictures)
        if line is not None and (first, second, line["images"]) not in compared:
            append_record(results, line)


def paired(first: str, second: str, blocks: range, images: int, pictures: Path) -> dict[str, Any] | None:
    """A line of one of PAIRS, from pictures made before; None while some are missing."""
    labels = np.arange(images) % 10
    samples = [[stored(pictures, block, name, labels) for block in blocks] for name in (first, second)]
    if any(sample is None for both in samples for sample in both):
        return None
    ours, theirs = (DigitSample.joined([part for part in both if part is not None]) for both in samples)
    difference = rounded(digit_differences(ours, theirs, real_digits()))
    return {"pair": [first, second], "images": len(ours), "difference": difference}


def measured(
    pipeline: Pipeline, entry: Configuration, plan: SamplingPlan, block: int, images: int, pictures: Path
) -> dict[str, Any]:
    """One line of the results; leaves the block's images in ``pictures``.

    ``cpu_seconds`` and ``wall_seconds`` are per image, one batch of all images of the block, decoding included.
    """
    real = real_digits()
    labels = np.arange(images) % 10
    seeds = list(range(block * images, (block + 1) * images))
    with stopwatch() as spent:
        made = pipeline.generate(labels.tolist(), seeds=seeds, plan=plan, batch_size=images)
    with atomic_path(pictures / f"{block}-{entry.name}.npz") as temporary:
        np.savez_compressed(temporary, grey=made.images[..., 0])
    sample = real.sample(made.images, labels)
    ours, theirs, pooled = [sample], [stored(pictures, block, BASE, labels)], [block]
    for earlier in range(block):
        found, base = (stored(pictures, earlier, name, labels) for name in (entry.name, BASE))
        if found is not None and base is not None:
            ours.append(found)
            theirs.append(base)
            pooled.append(earlier)
    whole, base = DigitSample.joined(ours), DigitSample.joined([part for part in theirs if part is not None])
    wrong = sample.posteriors.argmax(axis=1) != sample.labels
    return {
        "block": block,
        "configuration": entry.name,
        "factor": entry.factor,
        "settings": plan.settings.to_json(),
        "ar_steps": len(plan.steps),
        "head_calls": plan.head_calls,
        "flops": plan.flops,
        "cpu_seconds": round(spent[0].cpu / images, 5),
        "wall_seconds": round(spent[0].wall / images, 5),
        "figures": {name: values[0] for name, values in rounded(digit_figures(sample, real)).items()},
        "mistaken": [seeds[index] for index in np.flatnonzero(wrong)],
        "pooled_blocks": sorted(pooled),
        "pooled": rounded(digit_figures(whole, real)),
        "difference": {} if entry.name == BASE else rounded(digit_differences(whole, base, real)),
    }


def rounded(figures: Mapping[str, Estimate]) -> dict[str, list[float]]:
    """name: [value, low, high]."""
    return {
        name: [round(value, 4) for value in (figure.value, figure.low, figure.high) if value is not None]
        for name, figure in figures.items()
    }


def stored(pictures: Path, block: int, name: str, labels: np.ndarray) -> DigitSample | None:
    """The sample of images made earlier; None if they are not there."""
    file = pictures / f"{block}-{name}.npz"
    if not file.is_file():
        return None
    with np.load(file) as content:
        return real_digits().sample(np.repeat(content["grey"][..., None], 3, axis=-1), labels)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results so far. A last line that was cut off by an interruption is left out, and from the file too."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


if __name__ == "__main__":
    main()
