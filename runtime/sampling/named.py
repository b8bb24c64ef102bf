"""Plans as people write them: ``gtr``, ``gtr:cfg=3,fts=none``, or a file that ``gtr-run plan --json`` wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import PlanError, printable
from ..files import read_json
from ..models.architecture import Architecture
from .orders import stage_sets
from .plan import FittedSettings, PlanSettings, SamplingPlan, fitted, preset, resolve

_LONGEST = 300


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+"))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split("+"))


def _pair(text: str) -> tuple[int, ...]:
    numbers = _whole_numbers(text)
    return numbers * 2 if len(numbers) == 1 else numbers


_KINDS: dict[str, Callable[[str], Any]] = {
    "stages": int,
    "stage_steps": _whole_numbers,
    "generation_diffusion": _pair,
    "reconstruction_diffusion": int,
    "max_timestep": int,
    "fts_fraction": float,
    "fts_diffusion": int,
    "cfg": float,
    "guidance_interval": _numbers,
    "temperature": float,
}
"""What is not text."""

_NAMES = {"stages", *(field.name for field in fields(PlanSettings))} - {"name"}


def named_plan(
    text: str,
    architecture: Architecture,
    defaults: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
) -> SamplingPlan:
    """The plan that somebody names, resolved for one model.

    Args:
        text: a preset; a preset and changes, ``gtr:cfg=3,stage-steps=8+4+1``, with ``+`` between the numbers of a list
            and ``stages=K`` for the steps spread anew over K stages; or a file that ends in ``.json``.
        defaults: of the model, for what the plan leaves open.
        changes: settings by name, which count more than what the text says.

    Raises:
        PlanError: no such preset or setting, a value out of range, or one that does not fit the model.
        BundleError: the file is missing or not JSON.
    """
    settings = fitted(_read(text, architecture, defaults), architecture, defaults)
    values = dict(changes or {})
    if unknown := sorted(values.keys() - _NAMES):
        raise PlanError(f"a plan has no setting {unknown[0]!r}; it has {', '.join(sorted(_NAMES))}")
    stages = values.pop("stages", None)
    if stages is not None:
        if "stage_steps" in values and len(values["stage_steps"]) != stages:
            raise PlanError(f"stages {stages} contradicts stage steps with {len(values['stage_steps'])} numbers")
        settings = with_stages(settings, stages, architecture)
    return resolve(replace(settings, **values), architecture, defaults)


def split_plans(text: str) -> list[str]:
    """The plans of ``gtr,mar,gtr:cfg=3,fts=none``, in which ``fts=none`` goes on with the third.

    Raises:
        PlanError: there is none.
    """
    plans: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if plans and ":" in plans[-1] and "=" in part and ":" not in part:
            plans[-1] += f",{part}"
        else:
            plans.append(part)
    if not all(plans):
        raise PlanError(f"{printable(text)!r} names no plan between two commas; give for example gtr,mar")
    return plans


def with_stages(settings: FittedSettings, stages: int, architecture: Architecture) -> FittedSettings:
    """The same number of AR steps over ``stages`` stages [ours].

    The last stage keeps its steps; the others share the rest 4:1 from one to the next, as the paper's 24 and 6 do, cut
    to the tokens that a stage has.
    """
    if not 1 <= stages <= 8:
        raise PlanError(f"stages {stages} is not in 1..8")
    sizes = [len(members) for members in stage_sets(architecture.grid, stages, settings.parity)]
    if stages == 1:
        return replace(settings, stage_steps=(min(sum(settings.stage_steps), sizes[0]),))
    last = settings.stage_steps[-1] if len(settings.stage_steps) > 1 else 2
    rest = max(sum(settings.stage_steps) - last, stages - 1)
    weights = [4 ** (stages - 2 - k) for k in range(stages - 1)]
    steps = [max(1, round(rest * weight / sum(weights))) for weight in weights]
    return replace(settings, stage_steps=tuple(min(n, size) for n, size in zip([*steps, last], sizes, strict=True)))


def _read(text: str, architecture: Architecture, defaults: Mapping[str, Any]) -> PlanSettings:
    if text.endswith(".json"):
        value = read_json(Path(text))
        settings = value.get("plan", value) if isinstance(value, dict) else None
        if not isinstance(settings, dict):
            raise PlanError(f"{text} has no plan settings; gtr-run plan MODEL --json writes such files")
        return replace(PlanSettings.from_json(settings), name=Path(text).name)
    name, colon, rest = text.partition(":")
    settings = preset(name, architecture, defaults)
    if not colon:
        return settings
    if len(text) > _LONGEST:
        raise PlanError(f"the plan {printable(text)!r} is longer than {_LONGEST} characters")
    changes = dict(_change(part.strip()) for part in rest.split(","))
    return replace(named_plan(name, architecture, defaults, changes).settings, name=text)


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = {"decoder": "context"}.get(name, name).replace("-", "_")
    if not equals or name not in _NAMES:
        raise PlanError(f"{printable(text)!r} is no change of a plan; changes are {', '.join(sorted(_NAMES))}")
    try:
        return name, _KINDS.get(name, str)(value)
    except ValueError:
        raise PlanError(f"{name} {printable(value)!r} is no number, nor numbers with + between them") from None
