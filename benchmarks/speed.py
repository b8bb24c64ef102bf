"""Speed of whole generations: plans x precisions x backends x batch sizes, against the original PyTorch code.

python benchmarks/speed.py measure bundles/mar-b-fp32 bundles/mar-b-int8 --original ../mar --threads 2
python benchmarks/speed.py report --model mar-b --threads 2 --best --plot speed.png
python benchmarks/speed.py profile bundles/mar-b-fp32 --plan gtr-fast

Contenders take turns inside one run, so that a busy machine is busy for all of them, and ratios are always from one
run. Every timed generation is a line of the results, with wall and processor time. The decoder is left out on all
sides. Speed does not depend on what the weights are: bundles built with --random-weights do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from contenders import Contender, PipelineContender, short_plan
from original import OriginalContender
from profiling import HOST, profile_parts
from records import ORIGINAL, PEERS, REFERENCES, append_record, environment, load_average, now, points_of, read_records
from report import markdown, newest, plot_points
from roofline import Rates, measure_rates

from gtr_deploy.runtime import Bundle, GtrError, Pipeline, SamplingPlan, UsageError
from gtr_deploy.runtime.commands.console import CommandGroup, Reporter, print_table
from gtr_deploy.runtime.sampling.plan import ARStep, preset, preset_names, resolve
from gtr_deploy.runtime.sampling.shapes import step_shapes

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
PROFILES = RESULTS.with_name("profile.jsonl")
SETTLE = 0.05
"""Seconds between two turns, so that the threads of the last contender stop spinning."""

_PATH = click.Path(path_type=Path)
_THREADS = click.IntRange(1, 1024)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measures how fast bundles generate."""


@main.command()
@click.argument("bundles", nargs=-1, required=True, type=_PATH)
@click.option("--plans", default="mar,gtr,gtr-fast", show_default=True, help="Presets.")
@click.option("--batch", default="1", show_default=True, help="Batch sizes.")
@click.option("--backends", default="torch,onnxruntime,openvino", show_default=True, help="Those that cannot, say so.")
@click.option("--original", type=_PATH, help="Checkout of LTH14/mar: measured as it is, in bfloat16, compiled.")
@click.option("--threads", type=_THREADS, default=1, show_default=True, help="Of every contender.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Turns of every contender.")
@click.option("--results", type=_PATH, default=RESULTS, show_default=True, help="JSON lines to add to.")
def measure(
    bundles: tuple[Path, ...], plans: str, batch: str, backends: str, original: Path | None, threads: int, rounds: int,
    results: Path,
) -> None:  # fmt: skip
    """Times whole generations. Of the references (original, torch) only the plan `mar` is timed."""
    reporter = Reporter()
    names, sizes = _presets(plans), _sizes(batch)
    if results.exists():
        read_records(results)
    by_model: dict[str, list[Bundle]] = {}
    for bundle in map(Bundle.load, bundles):
        by_model.setdefault(bundle.architecture.name, []).append(bundle)
    with reporter.stage("the machine's rates"):
        rates = measure_rates(threads)
    run = {"run": now(), "environment": environment(), "rates": asdict(rates), "threads": threads}
    for own in by_model.values():
        contenders = _opened(own, backends.split(","), original, threads, reporter)
        try:
            for size in sizes:
                work = [(name, contender) for name in names for contender in contenders if _takes(contender, name)]
                take_turns(work, size, rounds, reporter, lambda line: append_record(results, {**run, **line}), rates)
        finally:
            for contender in contenders:
                contender.close()
    _show([point for point in points_of(read_records(results)) if point.record["run"] == run["run"]])


def _opened(
    bundles: Sequence[Bundle], backends: Sequence[str], original: Path | None, threads: int, reporter: Reporter
) -> list[Contender]:
    """All contenders of one model that can run here; why others cannot is said."""
    openers: list[tuple[str, Bundle, Callable[[], Contender]]] = []
    for bundle in bundles:
        if original is not None and bundle.precision == "fp32":
            for name in (ORIGINAL, *PEERS):
                openers.append((name, bundle, lambda n=name, b=bundle: OriginalContender(original, b, threads, n)))
        for name in backends:
            openers.append((name, bundle, lambda n=name, b=bundle: PipelineContender(n, b, threads)))
    found: list[Contender] = []
    for name, bundle, opener in openers:
        try:
            found.append(opener())
            found[-1].generate(short_plan(bundle), 1, 0)
        except GtrError as error:
            if name == ORIGINAL:
                raise
            reporter.say(f"{bundle.folder} {name}: not measured: {' '.join(str(error).split())}")
    return found


def _takes(contender: Contender, plan: str) -> bool:
    return contender.refusal(_plan(contender.bundle, plan)) is None and (
        contender.backend not in REFERENCES or plan == "mar"
    )


def _plan(bundle: Bundle, name: str) -> SamplingPlan:
    return resolve(preset(name, bundle.architecture, bundle.plan_defaults), bundle.architecture)


def take_turns(
    work: Sequence[tuple[str, Contender]],
    batch: int,
    rounds: int,
    reporter: Reporter,
    write: Callable[[Mapping[str, Any]], None],
    rates: Rates,
) -> None:
    """Times (plan, contender) pairs in turn, ``rounds`` times; ``write`` gets a line as soon as one has run.

    A contender that fails has no more turns.
    """
    failed: set[int] = set()
    for number in range(rounds):
        for name, contender in work:
            if id(contender) in failed:
                continue
            bundle, plan = contender.bundle, _plan(contender.bundle, name)
            title = f"{bundle.architecture.name} {name} batch {batch} {contender.backend} {bundle.precision}"
            time.sleep(SETTLE)
            load = load_average()
            try:
                seconds = contender.generate(plan, batch, number * batch)
            except GtrError as error:
                failed.add(id(contender))
                reporter.say(f"{title}: not measured: {' '.join(str(error).split())}")
                continue
            steps = [_work(step, plan, batch) for step in plan.steps]
            weights = [_weight_bytes(bundle, kind) for kind in ("backbone", "diffusion_step", "modulation")]
            line = {
                "model": bundle.architecture.name, "plan": name, "batch": batch, "backend": contender.backend,
                "precision": bundle.precision, "mode": "whole", "date": now(), "round": number,
                "seconds": seconds.wall, "cpu_seconds": seconds.cpu, "load_before": load,
                "flops": plan.flops * batch, "floor_seconds": rates.floor(steps, *weights),
                "settings": plan.settings.to_json(),
            }  # fmt: skip
            write(line)
            reporter.say(f"{title}: {seconds.wall:.3f} s, processor {seconds.cpu:.3f} s")


def _work(step: ARStep, plan: SamplingPlan, batch: int) -> tuple[int, int, int, int]:
    """FLOPs of backbone and head, calls of the reverse step and of its modulation."""
    modulated = sum(n for kind, _, n in step_shapes(step, plan.settings, batch) if kind == "modulation")
    return step.backbone_flops * batch, step.head_flops * batch, step.head_calls, modulated


def _weight_bytes(bundle: Bundle, kind: str) -> int:
    """Of the graph that a CPU runs and its file of weights, if it has one."""
    path = bundle.graph_paths(target="cpu")[kind]
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


@main.command()
@click.option("--results", type=_PATH, multiple=True, help="JSON lines; by default all results of speed here.")
@click.option("--model", help="Only this one.")
@click.option("--plans", help="Only these.")
@click.option("--batch", help="Only these sizes.")
@click.option("--threads", type=_THREADS, help="Only this many.")
@click.option("--best", is_flag=True, help="Of each precision only the fastest backend.")
@click.option("--plot", type=_PATH, help="PNG to write.")
def report(
    results: tuple[Path, ...], model: str | None, plans: str | None, batch: str | None, threads: int | None,
    best: bool, plot: Path | None,
) -> None:  # fmt: skip
    """Prints a table of the newest measurements."""
    files = results or tuple(path for path in (RESULTS.with_name("compare.jsonl"), RESULTS) if path.exists())
    wanted = {
        "model": None if model is None else (model,),
        "plan": None if plans is None else _presets(plans),
        "batch": None if batch is None else _sizes(batch),
        "threads": None if threads is None else (threads,),
    }
    points = newest(points_of([record for path in files for record in read_records(path)]), best)
    _show([p for p in points if all(v is None or p.record[name] in v for name, v in wanted.items())], plot)


def _show(points: Sequence[Any], plot: Path | None = None) -> None:
    if not points:
        raise UsageError("no such measurements; speed.py measure makes them")
    click.echo(markdown(points))
    if plot is not None:
        plot_points(plot, points)
        click.echo(f"plot: {plot}")


@main.command()
@click.argument("folder", type=_PATH)
@click.option("--plan", default="gtr", show_default=True, help="Preset.")
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=_THREADS, default=1, show_default=True)
@click.option("--results", type=_PATH, default=PROFILES, show_default=True, help="JSON lines to add to.")
def profile(folder: Path, plan: str, backend: str, batch_size: int, threads: int, results: Path) -> None:
    """Tells where one generation's time goes, graph by graph."""
    bundle = Bundle.load(folder)
    with Pipeline.load(bundle, backend=backend, threads=threads) as pipeline:
        parts = profile_parts(pipeline, pipeline.plan(_presets(plan)[0]), batch_size)
    total = sum(parts.seconds.values())
    line = {
        "model": bundle.architecture.name, "precision": bundle.precision, "plan": plan, "backend": backend,
        "batch": batch_size, "threads": threads, "run": now(), "environment": environment(), "seconds": total,
        "parts": dict(parts.seconds), "calls": dict(parts.calls),
    }  # fmt: skip
    append_record(results, line)
    rows = [
        [kind, f"{spent:.4f}", f"{spent / total:.2%}", "" if kind == HOST else str(parts.calls[kind])]
        for kind, spent in parts.seconds.items()
    ]
    click.echo(f"{folder}, {plan}, {backend}, threads: {threads}")
    print_table(["part", "seconds", "share", "calls"], rows)


def _presets(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names or (text,):
        if name not in preset_names():
            raise UsageError(f"plan {name!r} is not one of {', '.join(preset_names())}")
    return names


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text!r} is not a list of whole numbers of at least 1")
    return tuple(int(part) for part in parts)


if __name__ == "__main__":
    main(prog_name="speed.py")
