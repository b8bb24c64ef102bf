"""gtr-run bench: times whole generations, on one backend or on all that can run the bundle here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BackendError, UsageError
from ..sampling.named import named_plan, split_plans
from .backend_options import backend_options, load_pipeline
from .console import Reporter, echo, print_json, print_table
from .plan_options import plan_options
from .stop import if_stopped

if TYPE_CHECKING:
    from ..backends.row import BackendOptions
    from ..bundle.reader import Bundle
    from ..sampling.plan import SamplingPlan
    from .timing import Measurement


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@plan_options(multiple=True)
@click.option("--batch-size", default="1", show_default=True, help="Batch sizes, separated by commas.")
@click.option("--repeat", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option(
    "--all-backends",
    is_flag=True,
    help="Every backend that can run BUNDLE here but torch, the slow reference; says whether the fastest is the one "
    "that is taken without --backend.",
)
@backend_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@if_stopped("nothing is kept; the same command starts again")
def bench(
    bundle: Path,
    plan: str,
    overrides: Mapping[str, Any],
    batch_size: str,
    repeat: int,
    all_backends: bool,
    engine: BackendOptions,
    as_json: bool,
) -> None:
    """Time whole generations: warm-up, then the median of --repeat runs, and where the time goes."""
    from ..bundle.reader import Bundle

    sizes = _sizes(batch_size)
    if all_backends and (engine.backend, engine.provider) != ("auto", "auto"):
        raise UsageError("--all-backends leaves no choice: leave --backend and --provider out")
    opened = Bundle.load(bundle)
    plans = [named_plan(name, opened.architecture, opened.plan_defaults, overrides) for name in split_plans(plan)]
    reporter = Reporter(quiet=as_json)
    found: dict[str, list[Measurement]] = {}
    failed: dict[str, str] = {}
    if all_backends:
        taken, why, options = _every_backend(opened, engine)
        reporter.say(f"without --backend: {taken}: {why}")
        for name, one in options.items():
            try:
                _, _, found[name] = _measure(opened, one, plans, sizes, repeat, reporter)
            except (BackendError, UsageError) as error:  # such as --cuda-graph for one that has no GPU
                failed[name] = str(error)
                reporter.say(f"{name} left out: {error}")
        if not found:
            raise BackendError(f"no backend can run {bundle} here; gtr-run doctor {bundle} says why")
    else:
        taken, why, measurements = _measure(opened, engine, plans, sizes, repeat, reporter)
        found[taken] = measurements
    verdicts = _verdicts(found, taken) if all_backends else []
    if as_json:
        document = {
            "model": opened.architecture.name,
            "precision": opened.precision,
            "backend": taken,
            "backend_why": why,
            "measurements": [{"backend": name, **m.to_json()} for name, own in found.items() for m in own],
        }
        print_json(document | ({"failed": failed, "verdicts": verdicts} if all_backends else {}))
        return
    _print(opened, found)
    for verdict in verdicts:
        echo(verdict)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--batch-size {text!r} is not a list of whole numbers such as 1,8") from None
    if min(sizes) < 1:
        raise UsageError(f"--batch-size {text}: every size must be at least 1")
    return sizes


def _every_backend(bundle: Bundle, engine: BackendOptions) -> tuple[str, str | None, dict[str, BackendOptions]]:
    """The backend that is taken by itself, why, and the options of every one that can run here."""
    from ..backends.choice import resolve_backend, row_of
    from ..backends.registry import backend_rows
    from ..machine.examine import examine_machine

    resolved, why = resolve_backend(bundle, engine)
    machine = examine_machine(engine.device)
    options = {
        row.label: replace(engine, backend=row.name, provider=row.provider or "auto")
        for row in backend_rows()
        if row.name != "torch" and not row.refusal(bundle, machine)
    }
    return row_of(resolved).label, why, options


def _measure(
    bundle: Bundle, engine: BackendOptions, plans: list[SamplingPlan], sizes: list[int], repeat: int, reporter: Reporter
) -> tuple[str, str | None, list[Measurement]]:
    """The backend's name, why it was taken if the user left it open, and its measurements."""
    from .timing import measure

    measurements = []
    with load_pipeline(bundle, engine, reporter) as pipeline:
        for plan in plans:
            for size in sizes:
                with reporter.stage(f"plan {plan.settings.name}, batch {size}, {repeat} runs"):
                    measurements.append(measure(pipeline, plan, size, repeat))
    return pipeline.backend.name, pipeline.backend_why, measurements


def _verdicts(found: Mapping[str, Sequence[Measurement]], taken: str) -> list[str]:
    """One line per plan and batch size: the fastest backend against the one that is taken by itself."""
    lines = []
    for row in zip(*([(name, m) for m in own] for name, own in found.items()), strict=True):
        name, best = min(row, key=lambda pair: pair[1].median)
        line = f"{best.plan}, batch {best.batch_size}: {name} is fastest"
        chosen = dict(row).get(taken)
        if name == taken:
            line += ", and is taken without --backend"
        elif chosen is not None:
            line += f", {chosen.median / best.median:.2f} times as fast as {taken}, which is taken without --backend"
        lines.append(line)
    return lines


def _print(bundle: Bundle, found: Mapping[str, Sequence[Measurement]]) -> None:
    """Two tables. Peak memory is the process's, so it says nothing of the second of several backends."""
    from .timing import PARTS

    alone = len(found) == 1
    first = ["plan", "batch"] if alone else ["backend", "plan", "batch"]
    times, shares = [], []
    for name, measurements in found.items():
        for measurement in measurements:
            figures = measurement.to_json()
            which = [name, measurement.plan, str(measurement.batch_size)][3 - len(first) :]
            seconds = [f"{figures[key]:.3f}" for key in ("median", "p5", "p95")]
            peak = [f"{measurement.peak_memory / 2**20:.0f}"] if alone else []
            times.append([*which, *seconds, f"{measurement.images_per_second:.2f}", *peak])
            shares.append([*which, *(f"{measurement.shares[part]:.1%}" for part in PARTS)])
    title = f"{bundle.architecture.name}, {bundle.precision}" + (f", {next(iter(found))}" if alone else "")
    columns = [*first, "median s", "p5 s", "p95 s", "images/s", *(["peak MiB"] if alone else [])]
    print_table(columns, times, title=title)
    print_table([*first, *PARTS], shares, title="where the time goes")
