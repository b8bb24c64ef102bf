"""The commands of compare.py: measure, summary, suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from compare_bundles import RANDOM_MODELS, load_bundles, make_bundles
from compare_contenders import ORIGINAL
from compare_plans import known_plans
from compare_plots import plot_points
from compare_profiles import profiles_table, run_profiles
from compare_records import examine, latest, now, read_records
from compare_run import Comparison, Settings
from compare_scaling import models_table, plot_scaling, steps_table
from compare_summary import (
    Points,
    batch_table,
    embed,
    machine_text,
    points_table,
    refused_table,
    validation_table,
)  # fmt: skip
from compare_targets import targets_table
from roofline import measure_rates

from gtr_deploy.runtime import UsageError
from gtr_deploy.runtime.backends.registry import BACKENDS
from gtr_deploy.runtime.commands.console import CommandGroup, Reporter
from gtr_deploy.runtime.sampling.plan import PRESETS

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "compare.jsonl"
DOCS = HERE.parent / "docs" / "performance.md"


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measures how fast bundles generate, and says it in tables and plots."""


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_shared = _options(
    click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="Of every call."),
    click.option("--original", type=click.Path(path_type=Path), help="Checkout of LTH14/mar, to measure it, too."),
    click.option("--rounds", type=click.IntRange(1, 100), default=2, show_default=True, help="Visits to every call."),
    click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="JSON lines."),
    click.option("--force", is_flag=True, help="Measure again what is there already."),
)


@main.command()
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@click.option("--make", "models", multiple=True, help="Build bundles of this model (random weights) if missing.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bundles"), show_default=True,
              help="Where --make builds.")  # fmt: skip
@click.option(
    "--plans",
    default="mar,gtr,gtr-fast",
    show_default=True,
    help="Presets; gtr:24+6+2 is one with AR steps of its own.",
)
@click.option("--batch", default="1", show_default=True, help="Batch sizes.")
@click.option("--backends", help="Those of torch, onnxruntime, ... that take part; by default all that can.")
@click.option("--reference-plans", default="mar", show_default=True, help="Plans that torch and the original run.")
@click.option("--mode", type=click.Choice(["auto", "whole", "calls"]), default="auto", show_default=True,
              help="auto: whole generations of small models, calls of others.")  # fmt: skip
@click.option("--samples", type=click.IntRange(0), default=7, show_default=True,
              help="calls: AR steps whose backbone is measured, others interpolated in FLOPs; 0 for all.")  # fmt: skip
@click.option("--memory", default="", help="Plans whose peak memory is measured, each point in a process of its own.")
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@_shared
def measure(
    bundles: tuple[Path, ...], models: tuple[str, ...], folder: Path, plans: str, batch: str, backends: str | None,
    reference_plans: str, mode: str, samples: int, memory: str, provider: str, threads: int, original: Path | None,
    rounds: int, results: Path, force: bool,
) -> None:  # fmt: skip
    """Measures points, and prints the tables."""
    reporter = Reporter()
    for model in models:
        if model not in (*RANDOM_MODELS, "mar-digits"):
            raise UsageError(f"--make {model}: not one of mar-digits, {', '.join(RANDOM_MODELS)}")
    settings = Settings(
        plans=known_plans(plans, "--plans"),
        batches=_numbers(batch),
        backends=None if backends is None else _known(backends, "--backends", (*BACKENDS, ORIGINAL)),
        reference_plans=known_plans(reference_plans, "--reference-plans"),
        threads=threads, mode=mode, rounds=rounds, samples=samples,
        memory=_known(memory, "--memory", tuple(PRESETS)) if memory else (), provider=provider,
        original=original, force=force,
    )  # fmt: skip
    read_records(results)
    folders = list(bundles)
    for model in models:
        make_bundles(model, folder, reporter)
        folders += [folder / f"{model}-fp32", folder / f"{model}-int8"]
    found = load_bundles(folders)
    with reporter.stage("the machine's rates"):
        rates = measure_rates(threads)
    reporter.say(rates.text)
    Comparison(settings, examine(), rates, results, reporter, now()).run(found)
    print_tables(results)


@main.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="JSON lines.")
@click.option("--docs", type=click.Path(path_type=Path), help="Markdown file whose tables are replaced.")
@click.option("--plots", type=click.Path(path_type=Path), help="Folder for performance-*.png.")
def summary(results: Path, docs: Path | None, plots: Path | None) -> None:
    """Prints the tables of measured points; writes them and the plots into the documentation."""
    print_tables(results)
    write_docs(results, docs, plots)


@main.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bundles"), show_default=True,
              help="Where bundles are, or are built.")  # fmt: skip
@click.option("--docs", type=click.Path(path_type=Path), default=DOCS, show_default=True)
@click.option("--large/--no-large", default=True, show_default=True, help="A few calls of mar-l, too (8 GB of memory).")
@click.option("--prepare", is_flag=True, help="Only build the bundles.")
@_shared
def suite(
    folder: Path,
    docs: Path,
    large: bool,
    prepare: bool,
    threads: int,
    original: Path | None,
    rounds: int,
    results: Path,
    force: bool,
) -> None:
    """Everything that docs/performance.md shows, then its tables and plots. Give it a quiet machine."""
    reporter, environment, started = Reporter(), examine(), now()
    read_records(results)
    for model in ("mar-digits", "mar-b", *(("mar-l",) if large else ())):
        make_bundles(model, folder, reporter)
    if prepare:
        return
    with reporter.stage("the machine's rates"):
        rates = measure_rates(threads, 16.0)
    reporter.say(rates.text)
    for part in SUITE:
        if part["model"] == "mar-l" and not large:
            continue
        settings = Settings(
            plans=part["plans"], batches=part.get("batches", (1,)), backends=part.get("backends"),
            reference_plans=("mar",), threads=threads, mode=part["mode"], rounds=part.get("rounds", rounds),
            samples=part.get("samples", 0), memory=part.get("memory", ()), provider="cpu", original=original,
            force=force,
        )  # fmt: skip
        bundles = load_bundles([folder / f"{part['model']}-{precision}" for precision in ("fp32", "int8")])
        Comparison(settings, environment, rates, results, reporter, started).run(bundles)
        write_docs(results, docs, docs.parent / "images")
    profiles = [(folder / f"{name}", plan, ar_steps) for name, plan, ar_steps in PROFILES]
    run_profiles(profiles, results.parent, docs.parent / "images", threads, reporter)
    write_docs(results, docs, docs.parent / "images")
    print_tables(results)


#: Most important first: a run that is cut short still has the targets' rows.
SUITE: tuple[dict[str, Any], ...] = (
    {"model": "mar-b", "plans": ("mar", "gtr", "gtr-fast"), "mode": "calls", "samples": 6, "rounds": 2,
     "memory": ("gtr-fast",)},
    {"model": "mar-b", "plans": ("gtr-fast",), "mode": "calls", "samples": 3, "rounds": 1, "batches": (2, 4, 8),
     "memory": ("gtr-fast",), "backends": ("onnxruntime",)},
    {"model": "mar-digits", "plans": tuple(PRESETS), "mode": "whole", "rounds": 2},
    {"model": "mar-digits", "plans": tuple(PRESETS), "mode": "calls", "rounds": 2},
    {"model": "mar-b", "plans": ("gtr-fast",), "mode": "whole", "rounds": 1, "backends": ("onnxruntime",)},
    {"model": "mar-b", "plans": ("gtr-compact", "disa", "halton"), "mode": "calls", "samples": 4, "rounds": 1,
     "backends": ("onnxruntime",)},
    {"model": "mar-b", "plans": ("gtr:6+2+1", "gtr:48+12+4"), "mode": "calls", "samples": 4, "rounds": 1,
     "backends": ("onnxruntime",)},
    {"model": "mar-l", "plans": ("mar", "gtr-fast"), "mode": "calls", "samples": 3, "rounds": 1,
     "backends": ("torch", "onnxruntime")},
)  # fmt: skip


PROFILES = (("mar-b-fp32", "gtr-fast", 4), ("mar-b-int8", "gtr-fast", 4), ("mar-digits-fp32", "gtr", None))
"""Bundle, preset and AR steps that are profiled at the end."""


def print_tables(results: Path) -> None:
    """All tables, as markdown."""
    for name, content in _sections(results).items():
        click.echo(f"\n## {name}\n\n{content}")


def write_docs(results: Path, docs: Path | None, plots: Path | None) -> None:
    """Puts tables and plots where they are shown; None leaves them out."""
    if docs is not None:
        embed(docs, _sections(results))
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        points = Points.all(latest(read_records(results)))
        plot_points(points, plots)
        plot_scaling(points, plots)


def _sections(results: Path) -> dict[str, str]:
    points = Points.all(latest(read_records(results)))
    return {
        "machine": machine_text(points),
        "targets": targets_table(points),
        "points": points_table(points),
        "batches": batch_table(points),
        "AR steps": steps_table(points),
        "models": models_table(points),
        "validation": validation_table(points),
        "profile": profiles_table(results.parent),
        "not run": refused_table(points),
    }


def _known(text: str, option: str, names: Sequence[str]) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [part for part in parts if part not in names]
    if unknown or not parts:
        raise UsageError(f"{option} {unknown[0] if unknown else text!r}: not one of {', '.join(names)}")
    return parts


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text!r} is not a list of whole numbers of at least 1")
    return tuple(int(part) for part in parts)
