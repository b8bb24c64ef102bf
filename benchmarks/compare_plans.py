"""Plans by name: presets, and presets with AR steps of their own, such as ``gtr:6+2+1``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gtr_deploy.runtime import UsageError
from gtr_deploy.runtime.models.architecture import Architecture
from gtr_deploy.runtime.sampling.plan import PRESETS, PlanSettings, preset


def named_settings(name: str, architecture: Architecture, defaults: Mapping[str, Any] | None = None) -> PlanSettings:
    """``PRESET``, or ``PRESET:A+B+C`` with the AR steps of each stage; the settings keep the whole name."""
    base, varied, steps = name.partition(":")
    settings = preset(base, architecture, defaults)
    return replace(settings, name=name, stage_steps=_steps(steps)) if varied else settings


def is_preset(name: str) -> bool:
    """Whether a plan's name has no AR steps of its own."""
    return ":" not in name


def known_plans(text: str, option: str) -> tuple[str, ...]:
    """The plans in a list with commas.

    Raises:
        UsageError: one is neither a preset nor a preset with AR steps.
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names or (text,):
        base, varied, steps = name.partition(":")
        if base not in PRESETS or (varied and not _valid(steps, PRESETS[base].stage_steps)):
            presets = ", ".join(PRESETS)
            raise UsageError(f"{option} {name!r}: not one of {presets}, nor one with its stages' AR steps (gtr:24+6+2)")
    return names


def _valid(steps: str, stages: Sequence[int]) -> bool:
    parts = steps.split("+")
    return len(parts) == len(stages) and all(part.isdecimal() and int(part) > 0 for part in parts)


def _steps(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+"))
