"""The command-line options that override a plan's settings, shared by every command that takes a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import click

from ..errors import PlanError
from ..models.architecture import Architecture
from ..sampling.orders import ORDERS, PARITIES, stage_sets
from ..sampling.plan import (
    CFG_SCHEDULES,
    CONTEXTS,
    TOKEN_SCHEDULES,
    PlanSettings,
    SamplingPlan,
    preset,
    preset_names,
    resolve,
)
from ..sampling.selection import FTS_RULES
from .option_groups import given, with_options


class _Integers(click.ParamType):
    """Comma-separated whole numbers, a fixed count of them if given."""

    name = "integers"

    def __init__(self, count: int | None = None) -> None:
        self._count = count

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as {'50,20' if self._count else '24,6,2'}", param)
        if self._count and len(numbers) == 1:
            numbers *= self._count
        if self._count and len(numbers) != self._count:
            self.fail(f"{value!r} has {len(numbers)} numbers, {self._count} are wanted", param)
        return numbers


#: (option, setting, type, help)
_OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    ("--stage-steps", "stage_steps", _Integers(), "AR steps of each stage, e.g. 24,6,2; their number is K."),
    ("--order", "order", click.Choice(ORDERS), "Order in which tokens are made."),
    ("--parity", "parity", click.Choice(PARITIES), "Checkerboard squares that the last stage holds."),
    ("--token-schedule", "token_schedule", click.Choice(TOKEN_SCHEDULES), "Tokens per AR step within a stage."),
    (
        "--generation-diffusion",
        "generation_diffusion",
        _Integers(2),
        "Diffusion steps from the first to the last generation AR step, e.g. 50,20.",
    ),
    ("--reconstruction-diffusion", "reconstruction_diffusion", int, "Diffusion steps in the last stage."),
    ("--max-timestep", "max_timestep", int, "Largest kept diffusion timestep (999: MAR; 950: DiSA's cap)."),
    ("--fts", "fts", click.Choice(FTS_RULES), "Which tokens of the last stage get extra diffusion steps."),
    ("--fts-fraction", "fts_fraction", float, "Share of tokens that get them."),
    ("--fts-diffusion", "fts_diffusion", int, "Their diffusion steps."),
    ("--cfg", "cfg", float, "Guidance scale; 1 switches guidance off."),
    ("--cfg-schedule", "cfg_schedule", click.Choice(CFG_SCHEDULES), "Guidance over the AR steps."),
    ("--temperature", "temperature", float, "Scales the noise of the reverse steps."),
    ("--decoder", "context", click.Choice(CONTEXTS), "Whether the decoder sees the mask tokens of later stages."),
)


def plan_options(multiple: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds ``--plan`` and every override; the command gets ``plan`` and ``overrides`` (a mapping)."""

    options = {
        f"plan_{name}": click.option(o, f"plan_{name}", type=kind, help=text) for o, name, kind, text in _OPTIONS
    }
    stages = "Number of stages K; AR steps are spread anew, 4:1 from one generation stage to the next."
    option = click.option("--stages", "plan_stages", type=click.IntRange(1, 8), help=stages)
    several = " Several, separated by commas." if multiple else ""
    text = f"Preset: {', '.join(preset_names())}.{several}"

    names = ("--plan", "--plans") if multiple else ("--plan",)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = with_options(
            command, {"plan_stages": option, **options}, lambda values: {"overrides": given(values, "plan_")}
        )
        return click.option(*names, "plan", default="gtr", show_default=True, help=text)(wrapped)

    return decorate


def chosen_plan(
    name: str, overrides: Mapping[str, Any], architecture: Architecture, defaults: Mapping[str, Any]
) -> SamplingPlan:
    """The preset, the model's defaults, then the overrides, resolved.

    Raises:
        PlanError: a setting is out of range or does not fit the model.
    """
    settings = preset(name, architecture, defaults)
    values = dict(overrides)
    stages = values.pop("stages", None)
    if stages is not None:
        if "stage_steps" in values and len(values["stage_steps"]) != stages:
            raise PlanError(f"--stages {stages} contradicts --stage-steps with {len(values['stage_steps'])} numbers")
        settings = with_stages(settings, stages, architecture)
    return resolve(replace(settings, **values), architecture)


def with_stages(settings: PlanSettings, stages: int, architecture: Architecture) -> PlanSettings:
    """The same number of AR steps over ``stages`` stages [ours].

    The last stage keeps its steps; the others share the rest 4:1 from one to the next, as the paper's 24 and 6 do, cut
    to the tokens that a stage has.
    """
    sizes = [len(members) for members in stage_sets(architecture.grid, stages, settings.parity)]
    if stages == 1:
        return replace(settings, stage_steps=(min(sum(settings.stage_steps), sizes[0]),))
    last = settings.stage_steps[-1] if len(settings.stage_steps) > 1 else 2
    rest = max(sum(settings.stage_steps) - last, stages - 1)
    weights = [4 ** (stages - 2 - k) for k in range(stages - 1)]
    steps = [max(1, round(rest * weight / sum(weights))) for weight in weights]
    return replace(settings, stage_steps=tuple(min(n, size) for n, size in zip([*steps, last], sizes, strict=True)))
