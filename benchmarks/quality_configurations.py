"""The configurations of benchmarks/quality.py: one factor at a time around the preset ``gtr``.

On mar-digits (64 tokens) ``gtr`` is 16, 6, 2 AR steps; diffusion steps 50 -> 20, then 20; FTS 10 % of tokens with 50
steps; guidance 2, temperature 0.9, timesteps up to 950. ``mar-256`` is ``mar`` there, and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """One plan.

    Attributes:
        factor: what it is compared under; one figure each.
        name: unique, for people and for the results file.
        overrides: settings as ``gtr-run``'s plan options have them.
        preset: what they override.
        once: whether the first block is enough, because the outcome is beyond doubt.
    """

    factor: str
    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    preset: str = "gtr"
    once: bool = False


def _one_by_one(factor: str, setting: str, label: str, values: tuple[Any, ...]) -> list[Configuration]:
    def text(value: Any) -> str:
        return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return [Configuration(factor, f"{label} {text(value)}", {setting: value}) for value in values]


_FTS: tuple[Configuration, ...] = (
    *_one_by_one("fts", "fts", "fts", ("none", "random", "norm", "lowest", "all")),
    Configuration("fts", "fts 25%", {"fts_fraction": 0.25}),
    Configuration("fts", "fts 50%", {"fts_fraction": 0.5}),
    Configuration("fts", "fts random 50%", {"fts": "random", "fts_fraction": 0.5}),
    Configuration("fts", "fts 100 steps", {"fts_diffusion": 100}),
)
#: Where plain tokens get 3 diffusion steps only, extra steps have something to mend.
_POOR: tuple[Configuration, ...] = tuple(
    Configuration("fts at 3 steps", f"3 steps, {name}", {"reconstruction_diffusion": 3, **overrides})
    for name, overrides in (
        ("fts none", {"fts": "none"}),
        ("fts 10%", {}),
        ("fts 50%", {"fts_fraction": 0.5}),
        ("norm 50%", {"fts": "norm", "fts_fraction": 0.5}),
        ("random 50%", {"fts": "random", "fts_fraction": 0.5}),
        ("lowest 50%", {"fts": "lowest", "fts_fraction": 0.5}),
    )
)

_FEW: dict[str, Any] = {"generation_diffusion": (10, 10), "reconstruction_diffusion": 5, "fts": "none"}

#: The base first: the others are compared with its images.
CONFIGURATIONS: tuple[Configuration, ...] = (
    Configuration("preset", "gtr"),
    *_FTS,
    *_POOR,
    *_one_by_one("reconstruction diffusion", "reconstruction_diffusion", "reconstruction", (5, 10)),
    *(Configuration("preset", name, preset=name) for name in ("gtr-fast", "gtr-compact", "mar", "disa", "halton")),
    *_one_by_one("stages", "stages", "stages", (1, 2, 4)),
    *_one_by_one("parity", "parity", "parity", ("even",)),
    *_one_by_one("order", "order", "order", ("random", "raster", "halton")),
    *_one_by_one(
        "stage steps",
        "stage_steps",
        "steps",
        ((16, 6, 1), (16, 6, 4), (8, 6, 2), (8, 3, 1), (4, 2, 1), (2, 1, 1)),
    ),
    *_one_by_one(
        "generation diffusion",
        "generation_diffusion",
        "generation",
        ((10, 10), (20, 20), (50, 50), (100, 100)),
    ),
    *_one_by_one("guidance", "cfg", "cfg", (1.0, 1.5, 3.0, 4.0)),
    *_one_by_one("temperature", "temperature", "temperature", (0.8, 1.0)),
    Configuration("few steps", "4,2,1 at 10 and 5", _FEW | {"stage_steps": (4, 2, 1)}),
    Configuration("few steps", "8,3,1 at 10 and 5", _FEW | {"stage_steps": (8, 3, 1)}),
    *_one_by_one("max timestep", "max_timestep", "timestep", (900, 925, 975, 990, 999)),
    Configuration("max timestep", "gtr-fast at 999", {"max_timestep": 999}, "gtr-fast", once=True),
    Configuration("max timestep", "mar at 999", {"max_timestep": 999}, "mar", once=True),
)

#: Measured by themselves, with ``--only`` and a results file of their own; the base first.
FURTHER: dict[str, tuple[Configuration, ...]] = {
    "guidance-interval": (
        Configuration("preset", "gtr"),
        *(
            Configuration("guidance interval", f"guided {first:g}..{end:g}", {"guidance_interval": (first, end)})
            for first, end in ((0.1, 1.0), (0.25, 1.0), (0.5, 1.0), (0.0, 0.5))
        ),
    ),
}

#: Differences that are not from ``gtr``: first less second, on the same images, once all blocks are made.
PAIRS: tuple[tuple[str, str], ...] = (
    ("3 steps, fts 10%", "3 steps, fts none"),
    ("3 steps, fts 50%", "3 steps, fts none"),
    ("3 steps, fts 50%", "3 steps, random 50%"),
    ("3 steps, fts 50%", "3 steps, norm 50%"),
    ("3 steps, fts 50%", "3 steps, lowest 50%"),
    ("3 steps, lowest 50%", "3 steps, random 50%"),
    ("fts 50%", "fts random 50%"),
    ("gtr-fast", "mar"),
    ("steps 4-2-1", "mar"),
)
