"""The command-line options of engine building, shared by ``gtr-export engine`` and ``gtr-export build``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ...runtime.bundle.engine_sets import EngineSet, refusal
from ...runtime.commands.option_groups import given, with_options
from ...runtime.errors import PlanError, UsageError
from ...runtime.sampling.named import split_plans

if TYPE_CHECKING:
    from ...runtime.machine.examine import Machine
    from .builder import EngineResult


class _Names(click.ParamType):
    """Texts separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(split_plans(str(value)))
        except PlanError as error:
            self.fail(str(error), param)


def _option(name: str, setting: str, help: str, **more: Any) -> tuple[str, str, Callable[..., Any]]:
    return name, setting, click.option(name, f"engine_{setting}", help=help, **more)


_FLAG: dict[str, Any] = {"is_flag": True, "default": None}
_CAPABILITIES = "GPUs that tensorrt-rtx builds for, e.g. 8.9,12.0 (default: this one; else all usual)."
_PLANS = "Presets, or files of gtr-run plan --json, whose shapes are covered (default: gtr)."
_SCRATCH = "Most scratch memory of a kernel, in GB."
_LEVEL = "0 builds fastest, 5 searches longest (default: 3)."
_COMPATIBLE = "tensorrt only: engines for every GPU from compute capability 8.0 on."
_STRICT = "Fail if a half-precision engine mostly runs in float32."

_OPTIONS = (
    _option("--compute-capability", "compute_capabilities", _CAPABILITIES, type=_Names()),
    _option("--plans", "plans", _PLANS, type=_Names()),
    _option("--workspace", "workspace_gb", _SCRATCH, type=click.FloatRange(0, 1e4, min_open=True)),
    _option("--optimization-level", "optimization_level", _LEVEL, type=click.IntRange(0, 5)),
    _option("--hardware-compatible", "hardware_compatible", _COMPATIBLE, **_FLAG),
    _option("--strict", "strict", _STRICT, **_FLAG),
)
"""Name, field of EngineRequest, click's decorator."""


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the command gets ``choices``, the fields of EngineRequest that were given."""
    options = {f"engine_{setting}": option for _, setting, option in _OPTIONS}
    return with_options(command, options, lambda values: {"choices": given(values, "engine_")})


def option_names(choices: dict[str, Any]) -> str:
    """The options that were given, as typed."""
    return ", ".join(option for option, setting, _ in _OPTIONS if setting in choices)


def after_engines(result: EngineResult, machine: Machine) -> str:
    """What to type next: run them if they run here, else carry them there."""
    from ...runtime.bundle.reader import Bundle

    folder = result.bundle
    if refusal(result.engines, Bundle.load(folder), machine) is None:
        return f"gtr-run generate {folder} --backend {result.engines.flavour} --classes 3"
    return f"copy {folder} to the GPU machine; there: gtr-run doctor {folder.name}"


def engines_json(result: EngineResult) -> dict[str, Any]:
    """For ``--json``."""
    engines = result.engines
    told = ("flavour", "version", "compute_capabilities", "precision", "plans", "max_batch", "bytes")
    return {
        "key": engines.key,
        **{name: getattr(engines, name) for name in told},
        "layers": {kind: dict(graph.layers or {}) for kind, graph in engines.graphs.items()},
        "built": result.built,
        "cached": result.cached,
        "warnings": result.warnings,
        "seconds": result.seconds,
    }


def engine_rows(sets: tuple[EngineSet, ...]) -> list[list[str]]:
    """Cells of the table that ``inspect`` shows: engines, precision, plans, batch, MB."""
    return [[e.key, e.precision, ", ".join(e.plans), str(e.max_batch), f"{e.bytes / 1e6:.1f}"] for e in sets]


def last_line(result: EngineResult, machine: Machine) -> str:
    """Size, seconds, what comes next."""
    state = f"{len(result.built)} built, {len(result.cached)} cached, {result.seconds:.1f} s"
    size = f"{result.engines.bytes / 1e6:.1f} MB of engines {result.engines.key}"
    return f"{result.bundle}: {size} ({state}); next: {after_engines(result, machine)}"


def choose_for_build(
    engine: str, precision: str | None, choices: dict[str, Any], machine: Machine
) -> tuple[str, str, str | None]:
    """Engine library and precision of ``gtr-export build``, and one line about what was chosen for the user.

    Raises:
        UsageError: engine options without an engine.
    """
    from .target import choose_engine

    why = None
    if engine == "auto":
        engine, reason = choose_engine(machine)
        why = f"engine: {engine} ({reason})"
        if engine == "onnxruntime" and choices:
            why += f", {option_names(choices)} not used"
    elif engine == "onnxruntime" and choices:
        raise UsageError(f"{option_names(choices)}: onnxruntime runs the graphs themselves; give --engine tensorrt")
    if precision is None:
        precision = "fp32" if engine == "onnxruntime" else "fp16"
        why = (why or f"engine: {engine}") + f", precision: {precision}"
    return engine, precision, why
