"""Where one generation's time goes: per part, per AR step, and per operator type inside the ONNX graphs.

python benchmarks/profile_generation.py bundles/mar-b-fp32 --plan gtr-fast --ar-steps 5 --threads 1 --plot profile.png

Two generations are run: one whose parts are timed, and, with ONNX Runtime on a CPU, one under its own profiler, which
slows short operators down. (Not called profile.py: a module of that name would hide Python's own from cProfile.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from compare_contenders import PipelineContender
from compare_plots import Bar, plot_stacked
from compare_records import examine, load_average, now
from profile_operators import OperatorTime, ProfiledSessions
from profile_parts import ENGINE, HOST, PARTS, Clock, Profile, profile_parts, thinned, watched_sessions
from roofline import thread_count

from gtr_deploy.runtime import Bundle, Pipeline, SamplingPlan
from gtr_deploy.runtime.backends.registry import BACKENDS
from gtr_deploy.runtime.commands.console import CommandGroup, Reporter, print_json, print_table
from gtr_deploy.runtime.files import write_json

SHOWN = 0.01
"""Operators with a smaller share of their part are left out of table and plot."""


def profile_bundle(
    bundle: Bundle, plan_name: str, backend: str, threads: int, batch: int, ar_steps: int | None, reporter: Reporter
) -> tuple[Profile, list[OperatorTime], SamplingPlan]:
    """Runs both generations.

    Returns:
        The parts, the operators (none where the backend is not ONNX Runtime), and the plan that was run.
    """
    sessions = backend == "onnxruntime"
    provider: dict[str, Any] = {"provider": "cpu"} if backend in ("onnxruntime", "torch") else {}
    clock = Clock()
    with watched_sessions(clock) if sessions else nullcontext(), reporter.stage("open the bundle"):
        pipeline = Pipeline.load(bundle, backend, threads, **provider)
    with pipeline:
        plan = thinned(pipeline.plan(plan_name), ar_steps)
        with reporter.stage(f"{len(plan.steps)} AR steps"):
            # First the host's caches and the libraries' first calls, which later generations do not pay for.
            PipelineContender(pipeline, backend, bundle).host(plan, batch)
            profile_parts(pipeline, clock, SamplingPlan(plan.settings, plan.steps[:1]), batch, sessions)
            profile = profile_parts(pipeline, clock, plan, batch, sessions)
    if not sessions:
        return profile, [], plan
    with tempfile.TemporaryDirectory() as scratch:
        profiled = ProfiledSessions(Path(scratch))
        with profiled.opening():
            pipeline = Pipeline.load(bundle, backend, threads, checksums=False, **provider)
        with pipeline, reporter.stage("the same under ONNX Runtime's profiler"):
            profile_parts(pipeline, Clock(), plan, batch, sessions=False)
            profiled.finish()
        return profile, profiled.operators(), plan


def plot_profile(
    path: Path, title: str, profile: Profile, operators: Sequence[OperatorTime], steps: Sequence[int]
) -> None:
    """Bars of each AR step, and of each engine part's operators.

    Args:
        steps: 0-based indices in the plan of the AR steps that were run.
    """
    kinds = {part: part if part in ENGINE else "host" for part in PARTS}

    def merged(parts: dict[str, float]) -> list[tuple[str, float]]:
        sums: dict[str, float] = {}
        for part, seconds in parts.items():
            sums[kinds[part]] = sums.get(kinds[part], 0.0) + 1e3 * seconds
        return list(sums.items())

    bars = []
    for index, step in zip(steps, profile.steps, strict=True):
        bars.append(Bar(f"AR step {index + 1}", merged(step), f"{1e3 * sum(step.values()):.0f} ms"))
    for part in ENGINE:
        for entry in [one for one in operators if one.part == part and one.share >= SHOWN]:
            if part != "detail":
                scaled = 1e3 * entry.share * profile.parts[part] / len(profile.steps)
                bars.append(Bar(f"{part}: {entry.name}", [(part, scaled)], f"{entry.share:.1%} of {part}, mean"))
    plot_stacked(path, title, "ms", bars)


def report(profile: Profile, operators: Sequence[OperatorTime]) -> dict[str, Any]:
    """Plain values."""
    return {
        "seconds": profile.seconds,
        "host_share": profile.host_share,
        "parts": profile.parts,
        "calls": profile.calls,
        "steps": list(profile.steps),
        "operators": [vars(entry) for entry in operators],
    }


def full_report(
    bundle: Bundle, plan: str, backend: str, threads: int, batch: int, ar_steps: int | None, reporter: Reporter
) -> tuple[dict[str, Any], Profile, list[OperatorTime]]:
    """Profiles; what is written to disk says where and how, too."""
    load = load_average()
    found, operators, run = profile_bundle(bundle, plan, backend, threads, batch, ar_steps, reporter)
    settings = {
        "model": bundle.architecture.name, "precision": bundle.precision, "plan": plan, "backend": backend,
        "ar_steps": [step.index for step in run.steps], "batch": batch, "threads": threads, "date": now(),
        "load_before": load, "environment": examine().to_json(),
    }  # fmt: skip
    return {**settings, **report(found, operators)}, found, operators


def heading(value: dict[str, Any]) -> str:
    """One line that names a report."""
    name = f"{value['model']} {value['precision']} {value['plan']}, {value['backend']}"
    measured = f"{value['seconds']:.2f} s in {len(value['ar_steps'])} AR steps"
    return f"{name}, {thread_count(value['threads'])}: {measured}, host {value['host_share']:.2%}"


@click.group(cls=CommandGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
def group() -> None:
    """Only there for its one-line errors."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--plan", default="gtr", show_default=True, help="Preset.")
@click.option("--ar-steps", type=click.IntRange(1), help="Only so many AR steps, evenly spaced.")
@click.option("--backend", type=click.Choice(BACKENDS), default="onnxruntime", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File to write; - prints it.")
@click.option("--plot", type=click.Path(path_type=Path), help="PNG to write.")
def profile(
    folder: Path, plan: str, ar_steps: int | None, backend: str, batch_size: int, threads: int,
    json_file: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Profiles one generation, without the VAE decoder."""
    bundle = Bundle.load(folder)
    value, found, operators = full_report(bundle, plan, backend, threads, batch_size, ar_steps, Reporter())
    if plot is not None:
        plot_profile(plot, heading(value), found, operators, value["ar_steps"])
    if json_file is not None and str(json_file) == "-":
        print_json(value)
        return
    if json_file is not None:
        write_json(json_file, value)
    rows = [
        [part, "engine" if part in ENGINE else "host", f"{found.parts[part]:.4f}",
         f"{found.parts[part] / found.seconds:.2%}", str(found.calls[part]) if found.calls[part] else ""]
        for part in (*ENGINE, *HOST)
    ]  # fmt: skip
    print_table(["part", "where", "seconds", "share", "calls"], rows, heading(value))
    rows = [
        [entry.part, entry.name, f"{entry.seconds:.4f}", f"{entry.share:.1%}", str(entry.calls)]
        for entry in operators
        if entry.share >= SHOWN
    ]
    if rows:
        print_table(["graph", "operator", "seconds", "share", "calls"], rows, "operators, under the profiler")


if __name__ == "__main__":
    group.add_command(profile)
    import sys

    group.main(["profile", *sys.argv[1:]], prog_name="profile_generation.py")
