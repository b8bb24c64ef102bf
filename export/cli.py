"""gtr-export: turns a checkpoint into a bundle and proves it. Heavy imports wait until a command needs them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.engine_sets import FLAVOURS
from ..runtime.commands.backend_options import BackendName
from ..runtime.commands.console import CommandGroup, Reporter, echo, print_json, print_table
from ..runtime.commands.plan_options import plan_default_options
from ..runtime.commands.stop import if_stopped
from ..runtime.errors import BundleError, GtrError
from ..runtime.models.families import known_models
from ..runtime.models.graphs import PRECISIONS
from ..runtime.sampling.named import split_plans
from .build.request import WEIGHTS
from .calibration_commands import BUILD_OPTIONS, calibrate, calibration_options, check_calibration, sensitivity
from .engines.options import engine_options
from .own_model_options import inspect_checkpoint, own_model_options

_PATH = click.Path(path_type=Path)
_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
_checkpoint_option = click.option("--checkpoint", type=_PATH, help="MAR weights: .pth or .safetensors.")
_vae_option = click.option("--vae", type=_PATH, help="VAE: KL-16, latent diffusion's, or diffusers' AutoencoderKL.")
_MODELS = tuple(known_models())


@click.group(cls=CommandGroup, name="gtr-export", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gtr-deploy")
def main() -> None:
    """Export MAR checkpoints to bundles for gtr-run."""


main.add_command(calibrate)
main.add_command(sensitivity)


@main.command()
@click.option(
    "--model",
    type=click.Choice(("auto", *_MODELS)),
    default="auto",
    show_default=True,
    help="auto is a model of your own, whose sizes are found in --checkpoint.",
)
@_checkpoint_option
@_vae_option
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="auto",
    show_default=True,
    help="Which weights of the checkpoint: averaged (EMA) or last ones; auto is EMA where the file has it.",
)
@own_model_options
@plan_default_options
@click.option("--random-weights", is_flag=True, help="Untrained weights: everything but the pictures is real.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Default: fp32, or fp16 where engines are built.")
@click.option(
    "--engine",
    type=click.Choice(("auto", "onnxruntime", *FLAVOURS)),
    default="auto",
    show_default=True,
    help="Library that will run the graphs; auto is TensorRT where there is a GPU for it, else ONNX Runtime.",
)
@engine_options
@calibration_options(BUILD_OPTIONS)
@click.option("--max-batch", type=click.IntRange(1, 4096), default=8, show_default=True, help="Largest batch promised.")
@click.option("--out", type=_PATH, help="Bundle folder (default: bundles/NAME-PRECISION).")
@click.option("--force", is_flag=True, help="Rebuild everything, and replace a bundle of another model or precision.")
@_json_option
@if_stopped("finished stages are kept; the same command goes on from there")
def build(
    model: str,
    checkpoint: Path | None,
    vae: Path | None,
    weights: str,
    random_weights: bool,
    precision: str | None,
    engine: str,
    max_batch: int,
    out: Path | None,
    force: bool,
    as_json: bool,
    own: dict[str, Any],
    class_names: Path | None,
    plan_defaults: dict[str, Any],
    choices: dict[str, Any],
    calibration: dict[str, Any],
) -> None:
    """Build a bundle of ONNX graphs, and engines where there is a GPU for them, from a checkpoint.

    With --model but without --checkpoint the weights are looked for in the cache folder and in the original project's
    folders, then downloaded. With --checkpoint but without --model the model's sizes are those of the file.
    """
    from ..runtime.commands.timing import peak_memory
    from ..runtime.machine.examine import examine_machine
    from .build.build import build as run_build
    from .build.own_model import resolved
    from .build.request import BuildRequest, CalibrationChoices, OwnModel, default_out
    from .engines.builder import EngineRequest, build_engines, check_request
    from .engines.options import after_engines, choose_for_build, engines_json
    from .engines.target import NeedsGpuError

    reporter, machine = Reporter(quiet=as_json), examine_machine()
    flavour, precision, chosen = choose_for_build(engine, precision, choices, machine)
    if chosen:
        reporter.say(chosen)
    check_calibration(precision, calibration)
    settings, out = CalibrationChoices(**calibration), out or Path()
    request = BuildRequest(
        model, out, checkpoint, vae, random_weights, precision, max_batch, force, settings, weights,
        OwnModel(**own), class_names, plan_defaults=plan_defaults,
    )  # fmt: skip
    if out == Path():
        request = replace(request, out=default_out(request))
    request = resolved(request, reporter)
    entry, engines, later = request.entry(), None, None
    wanted = EngineRequest(request.out, flavour, force=force, **choices) if flavour in FLAVOURS else None
    if wanted is not None:  # what is wrong with the engine options shows before the long part, not after it
        try:
            check_request(wanted, machine, entry.architecture, entry.plan_defaults)
        except NeedsGpuError as error:
            later = error
    start = time.monotonic()
    result = run_build(request, reporter)
    if later is not None:
        raise GtrError(f"{result.bundle} is complete but for its engines: {later}")
    if wanted is not None:
        engines = build_engines(wanted, reporter, machine)
    seconds = time.monotonic() - start
    following = after_engines(engines, machine) if engines else f"gtr-export verify {result.bundle}"
    if as_json:
        print_json(
            {
                "bundle": str(result.bundle),
                "model": request.name,
                "precision": precision,
                "engine": flavour,
                "stages": result.stages,
                "engines": engines_json(engines) if engines else None,
                "bytes": result.bytes,
                "seconds": seconds,
                "peak_memory": peak_memory(),
                "next": following,
            }
        )
        return
    size, peak = result.bytes / 1e6, peak_memory() / 2**30
    held = f" and {engines.engines.bytes / 1e6:.1f} MB of engines" if engines else ""
    if result.unchanged and not (engines and engines.built):
        echo(f"{result.bundle} is up to date ({size:.1f} MB{held}, {seconds:.1f} s); next: {following}")
    else:
        amount = f"{size:.1f} MB{held} in {seconds:.0f} s, peak memory {peak:.1f} GiB"
        echo(f"{result.bundle}: {amount}; next: {following}")


@main.command()
@click.argument("bundle", type=_PATH)
@click.option("--engine", type=click.Choice(tuple(FLAVOURS)), required=True, help="Library that will run the engines.")
@click.option("--max-batch", type=click.IntRange(1, 4096), help="Largest batch covered (default: the bundle's).")
@engine_options
@click.option("--force", is_flag=True, help="Build engines that are already there, too.")
@_json_option
@if_stopped("finished engines are kept; the same command goes on from there")
def engine(
    bundle: Path, engine: str, max_batch: int | None, force: bool, as_json: bool, choices: dict[str, Any]
) -> None:
    """Build TensorRT or TensorRT-RTX engines of a bundle. Needs neither PyTorch nor onnx.

    TensorRT needs the GPU that will run the engines. TensorRT-RTX builds ahead of time for GPUs that are not here.
    """
    from ..runtime.machine.examine import examine_machine
    from .engines.builder import EngineRequest, build_engines
    from .engines.options import after_engines, engines_json, last_line

    machine = examine_machine()
    request = EngineRequest(bundle, engine, max_batch=max_batch, force=force, **choices)
    result = build_engines(request, Reporter(quiet=as_json), machine)
    if as_json:
        print_json({"bundle": str(bundle), **engines_json(result), "next": after_engines(result, machine)})
    else:
        echo(last_line(result, machine))


@main.command()
@click.argument("bundle", type=_PATH)
@_checkpoint_option
@_vae_option
@click.option(
    "--plans", help="Presets to compare whole generations for, separated by commas (default: all affordable)."
)
@click.option("--images", type=click.IntRange(1, 64), default=2, show_default=True, help="Images per preset.")
@click.option(
    "--backend",
    type=BackendName(auto=False),
    default="onnxruntime",
    show_default=True,
    help="What is checked: the graphs on the CPU, or engines on the GPU.",
)
@_json_option
@click.pass_context
@if_stopped("nothing is written; the same command starts again")
def verify(
    context: click.Context,
    bundle: Path,
    checkpoint: Path | None,
    vae: Path | None,
    plans: str | None,
    images: int,
    backend: str,
    as_json: bool,
) -> None:
    """Check a bundle rung by rung: loads, finite, graphs equal to PyTorch, images equal to PyTorch."""
    from .verify.report import keep_report
    from .verify.verify import verify as run_verify

    names = split_plans(plans) if plans is not None else None
    report = run_verify(bundle, Reporter(quiet=as_json), checkpoint, vae, names, images, backend)
    if as_json:
        print_json(report.to_json())
    else:
        rows = [
            [
                c.rung,
                c.subject,
                c.status.upper() if c.status == "failed" else c.status,
                *_numbers(c.value, c.tolerance),
                c.note,
            ]
            for c in report.checks
        ]
        title = f"{report.model}, {report.precision}, evaluated with {report.evaluated_with}"
        print_table(["rung", "what", "status", "error", "limit", "note"], rows, title=title)
        echo(f"rung reached: {report.reached}")
    if problem := keep_report(bundle, report):
        click.echo(f"gtr-export verify: the report is not kept in the bundle: {problem}", err=True)
    elif not as_json:
        echo(f"written to {bundle / 'reports' / report.file}")
    if report.failed:
        context.exit(1)


def _numbers(error: float | None, limit: float | None) -> tuple[str, str]:
    return "" if error is None else f"{error:.1e}", "" if limit is None else f"{limit:.0e}"


@main.command()
@click.argument("bundle", metavar="BUNDLE|CHECKPOINT", type=_PATH)
@_json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds, from its manifest alone; or which model a checkpoint is of."""
    if bundle.is_file():
        inspect_checkpoint(bundle, as_json)
        return
    from ..runtime.bundle.manifest import MANIFEST
    from ..runtime.bundle.reader import Bundle
    from ..runtime.files import read_json
    from ..runtime.models.graphs import signature
    from .build.sources import described
    from .engines.options import engine_rows

    opened = Bundle.load(bundle)
    if as_json:
        print_json(read_json(bundle / MANIFEST))
        return
    manifest, source, architecture = opened.manifest, opened.manifest.source, opened.architecture
    weights = f"random (seed {source.random_weights})"
    if source.checkpoint is not None:
        weights = described(architecture.name, "checkpoint", source.checkpoint)
    for label, text in (
        ("model", f"{architecture.name}, {architecture.tokens} tokens, width {architecture.width}"),
        ("asked for", opened.conditioner.summary),
        ("decoder", architecture.decoding),
        ("precision", f"{opened.precision}; float32: {', '.join(manifest.precision.float32)}"),
        ("weights", weights),
        *([("VAE", described(architecture.name, "vae", source.vae))] if source.vae else []),
        ("plans", ", ".join(f"{key} {_plain(value)}" for key, value in opened.plan_defaults.items())),
        ("batch", f"up to {opened.max_batch}"),
        ("tools", ", ".join(f"{key} {value}" for key, value in manifest.tools.items())),
        ("evidence", _evidence(opened)),
    ):
        echo(f"{label:10} {text}", " " * 11)
    rows = [
        [kind, str(entry.opset), f"{entry.bytes / 2**20:.1f}", signature(entry.inputs, entry.outputs, dtypes=False)]
        for kind, entry in opened.graphs.items()
    ]
    print_table(["graph", "opset", "MiB", "inputs -> outputs"], rows)
    if opened.engine_sets:
        print_table(["engines", "precision", "plans", "batch", "MB"], engine_rows(opened.engine_sets))


def _plain(value: Any) -> str:
    return ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)


def _evidence(opened) -> str:
    try:
        report = opened.read_report("parity")
    except BundleError as error:
        return str(error)
    if report is None:
        return f"none yet; gtr-export verify {opened.folder}"
    return f"rung reached: {report['rung_reached']}" + (" (with failures)" if report["failed"] else "")


@main.command()
@_json_option
def models(as_json: bool) -> None:
    """List the models that are known by name, and where their weights are."""
    from .doctor import model_rows

    rows = model_rows()
    if as_json:
        print_json(rows)
        return
    table = [{k: f"{v:,}" if k == "parameters" else str(v) for k, v in row.items()} for row in rows]
    where = ("model", "asked for", "weights")
    sizes = [name for name in rows[0] if name not in where[1:]]
    for chosen in (sizes, where):
        print_table(chosen, [[row[name] for name in chosen] for row in table])


@main.command()
@_json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Say what this machine has for exporting, what is missing, and how to get it."""
    from dataclasses import asdict

    from .doctor import examine

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(["what", "status", "detail"], [[f.subject, f.status, f.detail] for f in findings])
    if any(finding.status == "missing" for finding in findings):
        context.exit(1)


if __name__ == "__main__":
    main()
