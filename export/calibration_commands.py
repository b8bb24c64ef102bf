"""gtr-export calibrate and sensitivity: quantise a bundle that is there. They need neither a checkpoint nor torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..runtime.commands.console import Reporter, echo, print_json, print_table
from ..runtime.commands.option_groups import given, with_options
from ..runtime.commands.stop import if_stopped
from ..runtime.errors import UsageError
from ..runtime.models.graphs import QUANTISED
from ..runtime.sampling.plan import preset_names

_PATH = click.Path(path_type=Path)
_METHODS = ("max", "percentile", "entropy", "mse")


class _Keep(click.ParamType):
    """``auto`` or a number of layers."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value
        if not str(value).isdecimal():
            self.fail(f"{value!r} is neither auto nor a number of layers", param)
        return int(value)


_Option = tuple[str, str, Any, Any, str]  # option, setting, type, default, help
_PRESETS = click.Choice(preset_names())

BUILD_OPTIONS: tuple[_Option, ...] = (
    ("--calibration-images", "images", int, 64, "int8, fp8: images that activation ranges come from."),
    ("--calibration-plan", "plan", _PRESETS, "gtr", "int8, fp8: preset that they are sampled with."),
    ("--keep", "keep", _Keep(), "auto", "int8, fp8: the worst N layers, or what the gate needs, stay in float32."),
)

_FLOAT16 = ("--float16", "float16", _PATH, None, "fp16 bundle of the same checkpoint: what GPUs do not quantise.")

_MORE_OPTIONS: tuple[_Option, ...] = (
    ("--method", "method", click.Choice(_METHODS), None, "Range of an activation (default: mse; fp8: max)."),
    ("--percentile", "percentile", float, 99.99, "Of method percentile: share of the values inside."),
    ("--calibration-classes", "classes", str, None, "Classes to go round, as in gtr-run generate (default: all)."),
    ("--calibration-latents", "latents", _PATH, None, "Your own: NPZ of gtr-run generate --save-latents."),
    ("--calibration-batch", "batch_size", click.IntRange(1, 256), 4, "Images per batch; decides the memory."),
    ("--compared-images", "compared", click.IntRange(1, 64), 4, "Images that errors are measured on."),
    ("--threads", "threads", click.IntRange(1, 1024), None, "Threads of one call."),
)


def calibration_options(options: tuple[_Option, ...]) -> Callable[..., Any]:
    """Adds options; the command gets ``calibration``, those that were typed, by setting."""
    decorators = {}
    for option, setting, kind, default, text in options:
        shown = text if default is None else f"{text} [default: {default}]"
        decorators[f"calibration_{setting}"] = click.option(option, f"calibration_{setting}", type=kind, help=shown)
    return lambda command: with_options(
        command, decorators, lambda values: {"calibration": given(values, "calibration_")}
    )


def check_calibration(precision: str, calibration: dict[str, Any]) -> None:
    """Raises a UsageError for calibration options of a precision that is not calibrated."""
    if calibration and precision not in QUANTISED:
        names = ", ".join(option for option, setting, *_ in BUILD_OPTIONS if setting in calibration)
        raise UsageError(f"{names}: precision {precision} is not calibrated; give --precision int8 or fp8")


def _request(bundle: Path, out: Path | None, precision: str, calibration: dict[str, Any], force: bool = False) -> Any:
    from ..calibration.request import CalibrationRequest
    from ..runtime.bundle.reader import Bundle

    settings = dict(calibration)
    classes = settings.pop("classes", None)
    requests = None if classes is None else Bundle.load(bundle).conditioner.parse(classes)
    stem = bundle.name.removesuffix("-fp32")
    target = out or bundle.resolve().parent / f"{stem}-{precision}"
    return CalibrationRequest(bundle, target, precision, requests=requests, force=force, **settings)


@click.command()
@click.argument("bundle", type=_PATH)
@click.option("--precision", type=click.Choice(QUANTISED), default="int8", show_default=True)
@click.option("--out", type=_PATH, help="Bundle folder (default: beside BUNDLE, its name with the precision).")
@calibration_options((*BUILD_OPTIONS, _FLOAT16, *_MORE_OPTIONS))
@click.option("--force", is_flag=True, help="Calibrate again, and replace what is at --out.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@if_stopped("finished stages are kept; the same command goes on from there")
def calibrate(
    bundle: Path, precision: str, out: Path | None, force: bool, as_json: bool, calibration: dict[str, Any]
) -> None:
    """Make an int8 or fp8 bundle from an fp32 one, calibrated along real sampling runs."""
    from ..calibration.quantised_bundle import quantise_bundle

    start = time.monotonic()
    result = quantise_bundle(_request(bundle, out, precision, calibration, force), Reporter(quiet=as_json))
    seconds, following = time.monotonic() - start, f"gtr-export verify {result.bundle}"
    if as_json:
        print_json({"bundle": str(result.bundle), "state": result.state, "report": result.report, "next": following})
        return
    print_table(["flavour", "error of z", "of eps", "of images", "limit", "size", "kept"], report_rows(result.report))
    if result.report["rest"] == "fp32":
        echo("attention stays float32 on GPUs; --float16 with an fp16 bundle of the same checkpoint changes that")
    state = "is up to date" if result.state == "cached" else f"calibrated in {seconds:.0f} s"
    echo(f"{result.bundle} {state}; next: {following}")


def report_rows(report: Any) -> list[list[str]]:
    """One line per flavour."""
    rows = []
    for flavour, found in report["flavours"].items():
        size = sum(entry["bytes"] for entry in found["sizes"].values())
        whole = sum(entry["fp32_bytes"] for entry in found["sizes"].values())
        rows.append(
            [
                flavour,
                f"{found['errors']['z']:.4f}",
                f"{found['errors']['eps']:.4f}",
                f"{found['median_image_error']:.4f}",
                "" if found["gate"] is None else f"{found['gate']:g}",
                f"{size / whole:.1%}",
                ", ".join(found["kept"]) or "nothing",
            ]
        )
    return rows


@click.command()
@click.argument("bundle", type=_PATH)
@click.option("--precision", type=click.Choice(QUANTISED), default="int8", show_default=True)
@click.option(
    "--flavour", type=click.Choice(("tensorrt", "cpu")), default="tensorrt", show_default=True, help="Of int8."
)
@calibration_options((*BUILD_OPTIONS[:2], _FLOAT16, *_MORE_OPTIONS))
@click.option("--images", "per_layer", is_flag=True, help="Also whole images for each layer; slow.")
@click.option("--plot", type=_PATH, help="PNG to write.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@if_stopped("nothing is kept; the same command starts again")
def sensitivity(
    bundle: Path,
    precision: str,
    flavour: str,
    per_layer: bool,
    plot: Path | None,
    as_json: bool,
    calibration: dict[str, Any],
) -> None:
    """Show what each layer costs when it alone is quantised, worst first."""
    from dataclasses import asdict

    from ..calibration.quantised_bundle import bench_of
    from ..calibration.sensitivity import COST_COLUMNS, cost_rows, layer_costs
    from ..runtime.pictures.charts import checked_target

    if plot is not None:
        checked_target(plot)
    reporter = Reporter(quiet=as_json)
    request = _request(bundle, None, precision, calibration)
    bench = bench_of(request, "fp8" if precision == "fp8" else flavour, reporter)
    costs = layer_costs(bench, reporter, per_layer)
    title = f"{bench.architecture.name}, {precision}, {bench.flavour} graphs, plan {bench.plan.settings.name}"
    if as_json:
        print_json({"precision": precision, "flavour": bench.flavour, "layers": [asdict(cost) for cost in costs]})
    else:
        print_table(COST_COLUMNS, cost_rows(costs), title=title)
    if plot is not None:  # last: a disk that is full costs the plot alone
        from ..calibration.plot import plot_bars

        plot_bars(plot, f"{title}: share of the image error by layer", [(c.layer, c.contribution) for c in costs])
        if not as_json:
            echo(f"plot: {plot}")
