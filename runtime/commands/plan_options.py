"""The command-line options that override a plan's settings, shared by every command that takes a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..sampling.orders import ORDERS, PARITIES
from ..sampling.plan import CFG_SCHEDULES, CONTEXTS, MODEL_DEFAULTS, TOKEN_SCHEDULES, preset_names
from ..sampling.selection import FTS_RULES
from .option_groups import given, with_options


class _Numbers(click.ParamType):
    """Comma-separated numbers like those of an example, a fixed count of them if given."""

    def __init__(self, example: str, count: int | None = None, kind: type[int] | type[float] = int) -> None:
        self.name = "integers" if kind is int else "numbers"
        self._example, self._count, self._kind = example, count, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            what = "whole numbers" if self._kind is int else "numbers"
            self.fail(f"{value!r} is not a list of {what} such as {self._example}", param)
        if self._count and len(numbers) == 1:
            numbers *= self._count
        if self._count and len(numbers) != self._count:
            self.fail(f"{value!r} has {len(numbers)} numbers, {self._count} are wanted", param)
        return numbers


#: (option, setting, type, help)
_OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    ("--stage-steps", "stage_steps", _Numbers("24,6,2"), "AR steps of each stage, e.g. 24,6,2; their number is K."),
    ("--order", "order", click.Choice(ORDERS), "Order in which tokens are made."),
    ("--parity", "parity", click.Choice(PARITIES), "Checkerboard squares that the last stage holds."),
    ("--token-schedule", "token_schedule", click.Choice(TOKEN_SCHEDULES), "Tokens per AR step within a stage."),
    (
        "--generation-diffusion",
        "generation_diffusion",
        _Numbers("50,20", 2),
        "Diffusion steps from the first to the last generation AR step, e.g. 50,20.",
    ),
    ("--reconstruction-diffusion", "reconstruction_diffusion", int, "Diffusion steps in the last stage."),
    ("--max-timestep", "max_timestep", int, "Largest kept diffusion timestep (999: MAR; 950: DiSA's cap)."),
    ("--fts", "fts", click.Choice(FTS_RULES), "Which tokens of the last stage get extra diffusion steps."),
    ("--fts-fraction", "fts_fraction", float, "Share of tokens that get them."),
    ("--fts-diffusion", "fts_diffusion", int, "Their diffusion steps."),
    ("--cfg", "cfg", float, "Guidance scale; 1 switches guidance off."),
    ("--cfg-schedule", "cfg_schedule", click.Choice(CFG_SCHEDULES), "Guidance over the AR steps."),
    (
        "--guidance-interval",
        "guidance_interval",
        _Numbers("0.2,1", 2, float),
        "Guides AR steps from share A of the tokens known up to, not with, share B, e.g. 0.2,1; others cost half.",
    ),
    ("--temperature", "temperature", float, "Scales the noise of the reverse steps."),
    ("--decoder", "context", click.Choice(CONTEXTS), "Whether the decoder sees the mask tokens of later stages."),
)


def plan_default_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for everything that a model has a default of its own for (``MODEL_DEFAULTS``); the command gets
    ``plan_defaults``, what was typed."""
    options = {
        f"default_{name}": click.option(o, f"default_{name}", type=kind, help=f"What plans start from: {text}")
        for o, name, kind, text in _OPTIONS
        if name in MODEL_DEFAULTS
    }
    return with_options(command, options, lambda values: {"plan_defaults": given(values, "default_")})


def plan_options(multiple: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds ``--plan`` and every override; the command gets ``plan`` and ``overrides`` (a mapping)."""

    options = {
        f"plan_{name}": click.option(o, f"plan_{name}", type=kind, help=text) for o, name, kind, text in _OPTIONS
    }
    stages = "Number of stages K; AR steps are spread anew, 4:1 from one generation stage to the next."
    option = click.option("--stages", "plan_stages", type=click.IntRange(1, 8), help=stages)
    several = " Several, separated by commas." if multiple else ""
    text = (
        f"Preset ({', '.join(preset_names())}), with changes (gtr:cfg=3,fts=none), or a file of `plan --json`.{several}"
    )

    names = ("--plan", "--plans") if multiple else ("--plan",)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = with_options(
            command, {"plan_stages": option, **options}, lambda values: {"overrides": given(values, "plan_")}
        )
        return click.option(*names, "plan", default="gtr", show_default=True, help=text)(wrapped)

    return decorate
