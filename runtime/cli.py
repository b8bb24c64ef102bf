"""gtr-run: makes pictures from a bundle. Needs neither PyTorch nor onnx; heavy imports wait until a command runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .commands.backend_options import backend_options, load_pipeline
from .commands.bench import bench
from .commands.console import CommandGroup, Reporter, print_json, print_table
from .commands.doctor import doctor
from .commands.evaluate import evaluate
from .commands.plan_options import chosen_plan, plan_options
from .errors import UsageError
from .models.architecture import ARCHITECTURES, PLAN_DEFAULTS, Architecture
from .sampling.plan import preset, resolve

if TYPE_CHECKING:
    from .backends.registry import BackendOptions
    from .sampling.loop import StepResult

_BUNDLE = click.Path(path_type=Path)
_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


@click.group(cls=CommandGroup, name="gtr-run", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gtr-deploy")
def main() -> None:
    """Generate images from a bundle with the GtR two-stage sampler."""


@main.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--classes", required=True, help='Class indices, ranges or names: "3,7", "0-9", "golden retriever".')
@click.option("--images-per-class", type=click.IntRange(1, 100_000), default=1, show_default=True)
@plan_options()
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Image n gets seed + n.")
@click.option("--batch-size", type=click.IntRange(1, 4096), help="Images per batch (the bundle's max_batch).")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the PNGs.")
@click.option("--grid", type=click.Path(path_type=Path, dir_okay=False), help="PNG: a labelled contact sheet.")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), help="GIF: the grid filling in.")
@click.option("--save-latents", type=click.Path(path_type=Path, dir_okay=False), help="NPZ: latents, labels, seeds.")
@backend_options
@_json_option
def generate(
    bundle: Path,
    classes: str,
    images_per_class: int,
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
    for path, suffix, option in (
        (grid, ".png", "--grid"),
        (trace, ".gif", "--trace"),
        (save_latents, ".npz", "--save-latents"),
    ):
        if path is not None and path.suffix.lower() != suffix:
            raise UsageError(f"{option} {path} does not end in {suffix}")
    import numpy as np

    from .bundle.reader import Bundle
    from .files import atomic_path
    from .models.class_names import class_name, parse_classes
    from .pictures.trace import TraceRecorder, contact_sheet, save_png

    opened = Bundle.load(bundle)
    architecture = opened.architecture
    wanted = parse_classes(classes, architecture.label_names, architecture.classes)
    labels = [label for label in wanted for _ in range(images_per_class)]
    seeds = [seed + index for index in range(len(labels))]
    resolved = chosen_plan(plan, overrides, architecture, opened.plan_defaults)
    out.mkdir(parents=True, exist_ok=True)

    reporter = Reporter(quiet=as_json)
    pipeline = click.get_current_context().with_resource(load_pipeline(opened, engine, reporter))
    size = batch_size or min(len(labels), opened.max_batch)
    recorder = TraceRecorder(architecture, resolved) if trace else None
    start = time.perf_counter()
    batches = -(-len(labels) // size)
    with reporter.bar(f"generate {len(labels)} images, plan {plan}", batches * len(resolved.steps), "AR steps") as bar:

        def observer(first: int):
            record = recorder if first == 0 else None
            if pipeline.runs_whole_generations and record is None:
                return None  # watching would cost time

            def seen(result: StepResult) -> None:
                if record is not None:
                    record(result)
                bar.advance()

            return seen

        def finished(images: int) -> None:
            bar.to(-(-images // size) * len(resolved.steps))

        result = pipeline.generate(
            labels, seeds=seeds, plan=resolved, batch_size=size, observer=observer, finished=finished
        )
    seconds = time.perf_counter() - start

    names = [class_name(label, architecture.label_names) for label in labels]
    records: list[dict[str, Any]] = []
    for label, name, image_seed, image in zip(labels, names, seeds, result.images, strict=True):
        file = out / f"{_slug(name)}-class{label}-seed{image_seed}.png"
        settings = {
            "model": architecture.name,
            "precision": opened.precision,
            "backend": pipeline.backend.name,
            "class": label,
            "class_name": name,
            "seed": image_seed,
            "plan": resolved.settings.to_json(),
        }
        save_png(file, image, settings)
        records.append({"file": str(file), "class": label, "class_name": name, "seed": image_seed})
    if grid is not None:
        captions = [f"{name} · seed {image_seed}" for name, image_seed in zip(names, seeds, strict=True)]
        columns = images_per_class if len(wanted) > 1 and images_per_class > 1 else min(len(labels), 8)
        sheet = contact_sheet(result.images, captions, min(columns, 16), f"{architecture.name} · plan {plan}")
        with atomic_path(grid) as temporary:
            sheet.save(temporary)
    if recorder is not None and trace is not None:
        with reporter.stage("draw the trace"):
            recorder.save(trace, pipeline.backend.decode, names[:size])
    if save_latents is not None:
        with atomic_path(save_latents) as temporary:
            np.savez(temporary, latents=result.latents, labels=np.array(labels), seeds=np.array(seeds, dtype=np.uint64))
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
                "grid": str(grid) if grid else None,
                "trace": str(trace) if trace else None,
                "latents": str(save_latents) if save_latents else None,
            }
        )
        return
    click.echo(f"{len(labels)} images in {seconds:.1f} s ({seconds / len(labels):.2f} s each) -> {out}")
    for label, path in (("grid", grid), ("trace", trace), ("latents", save_latents)):
        if path is not None:
            click.echo(f"{label}: {path}")


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)[:40]


@main.command("plan")
@click.argument("bundle")
@plan_options()
@_json_option
def show_plan(bundle: str, plan: str, overrides: Mapping[str, Any], as_json: bool) -> None:
    """Print a plan as a table: what every AR step does and costs. BUNDLE may also be a model name such as mar-h."""
    architecture, defaults = _model_of(bundle)
    resolved = chosen_plan(plan, overrides, architecture, defaults)
    baseline = resolve(preset("mar", architecture, {**defaults, "cfg": resolved.settings.cfg}), architecture)
    ratio = baseline.flops / resolved.flops
    if as_json:
        print_json(
            {
                "model": architecture.name,
                "plan": resolved.settings.to_json(),
                "steps": [
                    {
                        "ar_step": step.index + 1,
                        "stage": step.stage + 1,
                        "known": step.known,
                        "predicted": step.predicted,
                        "context": step.context,
                        "diffusion_steps": step.diffusion_steps,
                        "refined": step.refined,
                        "refined_diffusion_steps": step.refined_diffusion_steps,
                        "guidance": step.guidance,
                        "flops": step.flops,
                        "share": step.flops / resolved.flops,
                    }
                    for step in resolved.steps
                ],
                "flops": resolved.flops,
                "head_calls": resolved.head_calls,
                "ratio_to_mar": ratio,
            }
        )
        return
    rows = [
        [
            str(step.index + 1),
            str(step.stage + 1),
            str(step.known),
            str(step.predicted),
            str(step.context),
            _diffusion_cell(step.diffusion_steps, step.refined, step.refined_diffusion_steps),
            f"{step.guidance:.2f}",
            f"{step.backbone_flops / resolved.flops:.1%}",
            f"{step.head_flops / resolved.flops:.1%}",
        ]
        for step in resolved.steps
    ]
    columns = ["AR step", "stage", "known", "predicted", "in context", "diffusion steps", "cfg", "backbone", "head"]
    print_table(columns, rows, title=f"{architecture.name}, plan {resolved.settings.name}")
    click.echo(
        f"{len(resolved.steps)} AR steps, {resolved.head_calls} diffusion head calls, "
        f"{_flops(resolved.flops)} per image; mar needs {_flops(baseline.flops)}: {ratio:.2f}x"
    )


def _diffusion_cell(plain: int, refined: int, refined_steps: int) -> str:
    return f"{plain} ({refined} tokens: {refined_steps})" if refined else str(plain)


def _flops(value: int) -> str:
    return f"{value / 1e12:.2f} TFLOP" if value >= 1e11 else f"{value / 1e9:.2f} GFLOP"


def _model_of(bundle: str) -> tuple[Architecture, Mapping[str, Any]]:
    """A bundle's model and plan defaults, read from its manifest alone; or those of a model name."""
    from .bundle.reader import Bundle

    if not Path(bundle).exists() and bundle in ARCHITECTURES:
        return ARCHITECTURES[bundle], PLAN_DEFAULTS[bundle]
    opened = Bundle.load(Path(bundle))
    return opened.architecture, opened.plan_defaults


main.add_command(bench)
main.add_command(doctor)
main.add_command(evaluate)

if __name__ == "__main__":
    main()
