"""Generates digits with several plans and counts how many are the digit that was asked for.

python examples/digits/evaluate.py bundles/mar-digits-fp32 --plans mar,gtr,gtr-fast,gtr-compact
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from judge import train_judge

from gtr_deploy.runtime import Bundle, Pipeline
from gtr_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from gtr_deploy.runtime.plan_options import chosen_plan


def load(folder: Path, threads: int | None) -> Pipeline:
    """The bundle on ONNX Runtime; bf16 through float32 casts, because its CPU provider has no bfloat16 products."""
    bundle = Bundle.load(folder)
    if bundle.precision != "bf16":
        return Pipeline.load(bundle, threads=threads)
    from gtr_deploy.export.bfloat16 import widen

    with tempfile.TemporaryDirectory() as scratch:
        paths = {kind: widen(path, Path(scratch) / path.name) for kind, path in bundle.graph_paths().items()}
        backend = OnnxRuntimeBackend(paths, threads)
    return Pipeline(bundle.architecture, backend, dict(bundle.plan_defaults), bundle.max_batch)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--plans", default="mar,gtr,gtr-fast,gtr-compact", show_default=True)
@click.option("--images", default=1000, show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--cfg", type=float, help="Guidance scale instead of the model's.")
@click.option("--max-timestep", type=int, help="Largest diffusion timestep instead of the model's.")
@click.option("--temperature", type=float, help="Temperature instead of the model's.")
@click.option("--threads", type=int, help="Threads of one engine call.")
@click.option("--json", "as_json", is_flag=True)
def evaluate(
    bundle: Path,
    plans: str,
    images: int,
    batch_size: int,
    cfg: float | None,
    max_timestep: int | None,
    temperature: float | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Reports the class accuracy per plan, judged by a classifier that has seen real digits only."""
    judge = train_judge()
    pipeline = load(bundle, threads)
    labels = np.arange(images, dtype=np.int64) % 10
    given = {"cfg": cfg, "max_timestep": max_timestep, "temperature": temperature}
    overrides = {name: value for name, value in given.items() if value is not None}
    results = {}
    for name in plans.split(","):
        plan = chosen_plan(name, overrides, pipeline.architecture, pipeline.plan_defaults)
        start = time.perf_counter()
        generated = pipeline.generate(labels.tolist(), plan=plan, batch_size=batch_size)
        seconds = time.perf_counter() - start
        accuracy = judge.accuracy(generated.images, labels)
        results[name] = {"accuracy": accuracy, "seconds": seconds}
        print(f"{name:12} {accuracy:.1%} of {images} images are the asked digit ({seconds:.0f} s)", file=sys.stderr)
    report = {"judge_held_out_accuracy": judge.held_out_accuracy, "images": images, "plans": results}
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print(f"the judge gets {judge.held_out_accuracy:.1%} of held-out real digits right")


if __name__ == "__main__":
    evaluate()
