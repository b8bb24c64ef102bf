"""One plan, several bundles of mar-digits: what each precision costs in pictures, size and time, next to the first one.

python examples/digits/compare.py bundles/mar-digits-fp32 bundles/mar-digits-int8 --write-report
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from judge import train_judge

from gtr_deploy.runtime import Bundle, Pipeline
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.bundle.manifest import graph_bytes
from gtr_deploy.runtime.commands.console import Reporter, print_table
from gtr_deploy.runtime.pipeline import Generation
from gtr_deploy.runtime.quality.digits import DigitMeasure, real_digits

SPEED_BATCHES = 5
"""Batches that are timed, bundles taking turns, so that a busy machine is busy for all of them."""


def load(folder: Path, threads: int | None) -> Pipeline:
    """The bundle on ONNX Runtime; bf16 through float32 casts, because its CPU provider has no bfloat16 products."""
    bundle = Bundle.load(folder)
    if bundle.precision != "bf16":
        return Pipeline.load(bundle, threads=threads)
    from gtr_deploy.export.graphs.bfloat16 import widen

    with tempfile.TemporaryDirectory() as scratch:
        paths = {kind: widen(path, Path(scratch) / path.name) for kind, path in bundle.graph_paths().items()}
        backend = OnnxRuntimeBackend(paths, threads)
    return Pipeline(bundle.architecture, bundle.conditioner, backend, dict(bundle.plan_defaults), bundle.max_batch)


@click.command()
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--plan", default="gtr", show_default=True)
@click.option("--images", default=1000, show_default=True, help="Class-balanced; image n has seed n in every bundle.")
@click.option("--batch-size", default=100, show_default=True)
@click.option("--threads", type=int, help="Threads of one engine call.")
@click.option("--write-report", is_flag=True, help="Adds the figures to reports/calibration.json where there is one.")
@click.option("--json", "as_json", is_flag=True)
def compare(
    bundles: tuple[Path, ...],
    plan: str,
    images: int,
    batch_size: int,
    threads: int | None,
    write_report: bool,
    as_json: bool,
) -> None:
    """Class accuracy, Frechet distance to the real digits, latents error, size and speed, per bundle."""
    reporter = Reporter(quiet=as_json)
    judge, real = train_judge(), real_digits()
    labels, once = np.arange(images) % 10, np.ones(images, dtype=np.int64)
    pipelines = [load(folder, threads) for folder in bundles]
    made: list[Generation] = []
    for folder, pipeline in zip(bundles, pipelines, strict=True):
        with reporter.stage(f"{images} images, {folder}"):
            made.append(pipeline.generate(labels.tolist(), plan=plan, batch_size=batch_size))
    with reporter.stage("time"):
        seconds = _seconds(pipelines, plan, min(batch_size, 20))
    rows: list[dict[str, Any]] = []
    for folder, generation, spent in zip(bundles, made, seconds, strict=True):
        bundle = Bundle.load(folder)
        difference = np.linalg.norm(generation.latents - made[0].latents, axis=(1, 2))
        errors = difference / np.linalg.norm(made[0].latents, axis=(1, 2))
        rows.append(
            {
                "bundle": str(folder),
                "precision": bundle.precision,
                "plan": plan,
                "images": images,
                "class_accuracy": judge.accuracy(generation.images, labels),
                "frechet_distance": DigitMeasure(real.sample(generation.images, labels), real)(once)[
                    "frechet_distance"
                ],
                "latents_error": {
                    "median": float(np.median(errors)),
                    "p95": float(np.percentile(errors, 95)),
                    "worst": float(errors.max()),
                },
                "graph_bytes": sum(graph_bytes(path) for path in bundle.graph_paths(False, target="cpu").values()),
                "speed_ratio": seconds[0] / spent,
            }
        )
        report = bundle.read_report("calibration")
        if write_report and report is not None:
            bundle.write_report("calibration", {**report, "quality": {"compared_with": str(bundles[0]), **rows[-1]}})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    columns = ["bundle", "precision", "accuracy", "Frechet distance", "latents error 50/95/100 %", "MB", "speed"]
    table = [
        [
            row["bundle"],
            row["precision"],
            f"{row['class_accuracy']:.1%}",
            f"{row['frechet_distance']:.2f}",
            " / ".join(f"{value:.3f}" for value in row["latents_error"].values()),
            f"{row['graph_bytes'] / 1e6:.1f}",
            f"{row['speed_ratio']:.2f}x",
        ]
        for row in rows
    ]
    print_table(columns, table, title=f"mar-digits, plan {plan}, {images} images")


def _seconds(pipelines: list[Pipeline], plan: str, batch: int) -> list[float]:
    """Median seconds of a batch, per pipeline."""
    labels = [index % 10 for index in range(batch)]
    spent: list[list[float]] = [[] for _ in pipelines]
    for _ in range(SPEED_BATCHES):
        for pipeline, times in zip(pipelines, spent, strict=True):
            start = time.perf_counter()
            pipeline.generate(labels, plan=plan, batch_size=batch)
            times.append(time.perf_counter() - start)
    return [float(np.median(times)) for times in spent]


if __name__ == "__main__":
    compare()
