"""gtr-run generate: images from a bundle, as PNGs that carry their own settings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..sampling.named import named_plan
from .backend_options import backend_options, load_pipeline
from .console import Reporter, print_json
from .plan_options import plan_options
from .request_options import RequestOptions, image_settings, request_options

if TYPE_CHECKING:
    from ..backends.row import BackendOptions
    from ..sampling.job import StepResult


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@request_options
@plan_options()
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Image n gets seed + n.")
@click.option("--batch-size", type=click.IntRange(1, 4096), help="Images per batch (the bundle's max_batch).")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the PNGs.")
@click.option("--grid", type=click.Path(path_type=Path, dir_okay=False), help="PNG: a contact sheet with captions.")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), help="GIF: the grid filling in.")
@click.option("--save-latents", type=click.Path(path_type=Path, dir_okay=False), help="NPZ: latents and seeds.")
@backend_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def generate(
    bundle: Path,
    requests: RequestOptions,
    plan: str,
    overrides: Mapping[str, Any],
    seed: int,
    batch_size: int | None,
    out: Path,
    grid: Path | None,
    trace: Path | None,
    save_latents: Path | None,
    engine: BackendOptions,
    as_json: bool,
) -> None:
    """Generate images and write them as PNGs that carry their own settings."""
    kinds = (grid, ".png", "--grid"), (trace, ".gif", "--trace"), (save_latents, ".npz", "--save-latents")
    for path, suffix, option in kinds:
        if path is not None and path.suffix.lower() != suffix:
            raise UsageError(f"{option} {path} does not end in {suffix}")
    import numpy as np

    from ..bundle.reader import Bundle
    from ..files import atomic_path, sweep
    from ..pictures.png import save_png
    from ..pictures.sheet import contact_sheet
    from ..pictures.trace import TraceRecorder

    opened = Bundle.load(bundle)
    architecture, conditioner = opened.architecture, opened.conditioner
    wanted = requests.parsed(conditioner)
    asked = [request for request in wanted for _ in range(requests.images)]
    seeds = [seed + index for index in range(len(asked))]
    resolved = named_plan(plan, architecture, opened.plan_defaults, overrides)
    out.mkdir(parents=True, exist_ok=True)
    for folder in {out, *(path.parent for path in (grid, trace, save_latents) if path is not None)}:
        sweep(folder)

    reporter = Reporter(quiet=as_json)
    pipeline = click.get_current_context().with_resource(load_pipeline(opened, engine, reporter))
    size = batch_size or min(len(asked), opened.max_batch)
    recorder = TraceRecorder(architecture, resolved) if trace else None
    start = time.perf_counter()
    batches = -(-len(asked) // size)
    with reporter.bar(f"generate {len(asked)} images, plan {plan}", batches * len(resolved.steps), "AR steps") as bar:

        def observer(first: int):
            if pipeline.backend.whole_generations and (recorder is None or first):
                return None  # watching would cost time

            def seen(result: StepResult) -> None:
                if recorder is not None and not first:
                    recorder(result)
                bar.advance()

            return seen

        def finished(images: int) -> None:
            bar.to(-(-images // size) * len(resolved.steps))

        result = pipeline.generate(asked, seeds, resolved, size, observer=observer, finished=finished)
    seconds = time.perf_counter() - start

    names = [conditioner.caption(request) for request in asked]
    records: list[dict[str, Any]] = []
    for request, image_seed, image in zip(asked, seeds, result.images, strict=True):
        file = out / f"{conditioner.stem(request)}-seed{image_seed}.png"
        save_png(file, image, image_settings(opened, pipeline.backend.name, request, image_seed, resolved))
        records.append({"file": str(file), **conditioner.record(request), "seed": image_seed})
    if grid is not None:
        captions = [f"{name} · seed {image_seed}" for name, image_seed in zip(names, seeds, strict=True)]
        columns = requests.images if len(wanted) > 1 and requests.images > 1 else min(len(asked), 8)
        sheet = contact_sheet(result.images, captions, min(columns, 16), f"{architecture.name} · plan {plan}")
        with atomic_path(grid) as temporary:
            sheet.save(temporary)
    if recorder is not None and trace is not None:
        with reporter.stage("draw the trace"):
            recorder.save(trace, pipeline.backend.decode, names[:size])
    if save_latents is not None:
        with atomic_path(save_latents) as temporary:
            arrays = {"latents": result.latents, "seeds": np.array(seeds, np.uint64), **conditioner.stored(asked)}
            np.savez(temporary, allow_pickle=False, **arrays)
    others = {"grid": grid, "trace": trace, "latents": save_latents}
    if as_json:
        print_json(
            {
                "model": architecture.name,
                "precision": opened.precision,
                "backend": pipeline.backend.name,
                "backend_why": pipeline.backend_why,
                "plan": resolved.settings.to_json(),
                "seconds": seconds,
                "images": records,
                **{name: str(path) if path else None for name, path in others.items()},
            }
        )
        return
    click.echo(f"{len(asked)} images in {seconds:.1f} s ({seconds / len(asked):.2f} s each) -> {out}")
    for name, path in others.items():
        if path is not None:
            click.echo(f"{name}: {path}")
