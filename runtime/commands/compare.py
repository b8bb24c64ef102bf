"""gtr-run compare: the same requests and seeds under several plans, side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..sampling.named import named_plan, split_plans
from .backend_options import backend_options, load_pipeline
from .console import Reporter, echo, print_json, print_table
from .plan import flops_text
from .plan_options import plan_options
from .request_options import RequestOptions, request_options
from .stop import if_stopped

if TYPE_CHECKING:
    from ..backends.row import BackendOptions

_MOST_PLANS, _MOST_COLUMNS = 20, 16


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@request_options
@plan_options(multiple=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first column; each further one adds 1.")
@click.option("--grid", type=click.Path(path_type=Path), default=Path("compare.png"), show_default=True, help="A PNG.")
@backend_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@if_stopped("nothing is drawn; the same command starts again")
def compare(
    bundle: Path,
    requests: RequestOptions,
    plan: str,
    overrides: Mapping[str, Any],
    seed: int,
    grid: Path,
    engine: BackendOptions,
    as_json: bool,
) -> None:
    """Draw one picture: a row per plan, a column per request and seed; time and FLOPs in the margin.

    The first plan is what the others are compared with.
    """
    from ..bundle.reader import Bundle
    from ..files import atomic_path
    from ..pictures.sheet import contact_sheet

    if grid.suffix.lower() != ".png":
        raise UsageError(f"--grid {grid} does not end in .png")
    opened = Bundle.load(bundle)
    opened.check_decoder("compare")
    asked = [request for request in requests.parsed(opened.conditioner) for _ in range(requests.images)]
    plans = [named_plan(name, opened.architecture, opened.plan_defaults, overrides) for name in split_plans(plan)]
    if len(plans) > _MOST_PLANS or len(asked) > _MOST_COLUMNS:
        limits = f"{_MOST_PLANS} plans and {_MOST_COLUMNS} images"
        raise UsageError(f"{len(plans)} plans of {len(asked)} images each: nobody can read more than {limits}")
    seeds = [seed + index for index in range(len(asked))]
    reporter = Reporter(quiet=as_json)
    pipeline = click.get_current_context().with_resource(load_pipeline(opened, engine, reporter))
    pipeline.generate(asked[:1], seeds[:1], plans[0])  # the first call of every graph is slower
    images, rows = [], []
    for one in plans:
        with reporter.stage(f"plan {one.settings.name}"):
            start = time.perf_counter()
            images.extend(pipeline.generate(asked, seeds, one).images)
            seconds = (time.perf_counter() - start) / len(asked)
        rows.append({"plan": one.settings.name, "ar_steps": len(one.steps), "seconds": seconds, "flops": one.flops})
    import numpy as np

    first = rows[0]
    margin = [
        (
            row["plan"],
            f"{row['ar_steps']} AR steps",
            f"{row['seconds']:.3g} s ({first['seconds'] / row['seconds']:.2f}x)",
            f"{flops_text(row['flops'])} ({first['flops'] / row['flops']:.2f}x)",
        )
        for row in rows
    ]
    names = [opened.conditioner.caption(request) for request in asked]
    captions = [f"{name} · seed {one}" for name, one in zip(names, seeds, strict=True)] * len(plans)
    title = f"{opened.architecture.name} {opened.precision} · {pipeline.backend.description}"
    with atomic_path(grid) as temporary:
        contact_sheet(np.stack(images), captions, len(asked), title, margin).save(temporary)
    if as_json:
        print_json({"model": opened.architecture.name, "grid": str(grid), "seeds": seeds, "plans": rows})
        return
    print_table(["plan", "AR steps", "s per image", "FLOPs"], [list(line) for line in margin])
    echo(f"grid: {grid}")
