"""What a generation does, fixed before it runs: settings, presets, and the list of AR steps they resolve to.

A plan knows the model's sizes and nothing else; seeds, weights and engines come later (sampler.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError
from ..models.architecture import Architecture
from ..models.families import FAMILIES, family_of
from ..models.family import Family
from .diffusion import TRAINING_STEPS, kept_timesteps
from .orders import ORDERS, PARITIES, stage_sets
from .selection import FTS_RULES, refined_count

TOKEN_SCHEDULES = ("uniform", "cosine")
CFG_SCHEDULES = ("linear", "constant")
CONTEXTS = ("full", "compact")


@dataclass(frozen=True)
class PlanSettings:
    """Everything that can be chosen about a generation. What is None comes from the model.

    Attributes:
        name: preset that these settings come from, for people; changes nothing.
        stage_steps: AR steps per stage; their number is K [paper].
        order: ``gtr`` (checkerboard stages), ``random``, ``raster`` or ``halton``; the last three use the same stage
            sizes, filled in their own order [ours].
        parity: colour of the board that the last stage holds; ``odd`` [paper], ``even`` swaps.
        token_schedule: tokens per AR step of a stage: ``uniform`` by cumulative rounding [ours] or MAR's ``cosine``.
        generation_diffusion: diffusion steps at the first and the last AR step of the generation stages, falling
            linearly [paper; per AR step: ours]. With a single stage all of it counts as generation.
        reconstruction_diffusion: diffusion steps in the last stage [paper: 20].
        max_timestep: largest kept diffusion timestep; 999 is MAR's own respacing, 950 DiSA's cap.
        fts: which tokens of the last stage are refined; see ``selection.FTS_RULES``.
        fts_fraction: share of tokens refined [paper: 0.1].
        fts_diffusion: diffusion steps of a refined token [paper: 50].
        cfg: guidance scale; 1 switches guidance off.
        cfg_schedule: ``linear`` grows with the share of known tokens (MAR), ``constant`` does not.
        guidance_interval: (A, B); an AR step is guided where A <= known tokens before it / all < B, elsewhere it runs
            the conditional branch alone, at half the cost [ours; Kynkaanniemi et al. 2024, limited interval guidance].
        temperature: scales the noise of the reverse steps.
        context: ``full``: the decoder sees a mask token for every unknown position (the literal paper); ``compact``:
            those of later stages are left out [ours, one reading of the paper's FLOPs].
    """

    name: str
    stage_steps: tuple[int, ...]
    order: str = "gtr"
    parity: str = "odd"
    token_schedule: str = "uniform"
    generation_diffusion: tuple[int, int] = (50, 20)
    reconstruction_diffusion: int = 20
    max_timestep: int | None = None
    fts: str = "fts"
    fts_fraction: float = 0.1
    fts_diffusion: int = 50
    cfg: float | None = None
    cfg_schedule: str | None = None
    guidance_interval: tuple[float, float] | None = None
    temperature: float | None = None
    context: str = "full"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, tuples as lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PlanSettings:
        """The settings that :meth:`to_json` wrote.

        Raises:
            PlanError: unknown fields, or missing ones without a default.
        """
        unknown = set(value) - {field.name for field in fields(cls)}
        if unknown or not {"name", "stage_steps"} <= set(value):
            raise PlanError(f"plan settings have unknown or missing fields: {sorted(unknown) or 'name, stage_steps'}")
        settings: dict[str, Any] = {k: tuple(item) if isinstance(item, list) else item for k, item in value.items()}
        return cls(**settings)


@dataclass(frozen=True)
class FittedSettings(PlanSettings):
    """Settings in which nothing is left open; see :func:`fitted`."""

    max_timestep: int = TRAINING_STEPS - 1
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    temperature: float = 1.0


MODEL_DEFAULTS = ("cfg", "cfg_schedule", "guidance_interval", "max_timestep", "temperature")
"""Settings for which a model can have defaults of its own."""


def presets_of(family: Family) -> dict[str, PlanSettings]:
    """The presets of a model family, by name."""
    return {name: PlanSettings(name, **settings) for name, settings in family.presets.items()}


def preset_names() -> tuple[str, ...]:
    """Every name that is a preset of some family."""
    return tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.presets))


PRESETS: dict[str, PlanSettings] = presets_of(FAMILIES["mar"])
"""The presets of class-conditional MAR; what differs between models comes with :func:`preset`."""


@dataclass(frozen=True)
class ARStep:
    """One autoregressive step; every shape of it follows from these numbers and the batch size.

    Attributes:
        index: 0-based.
        stage: 0-based.
        known: V, tokens known before the step.
        predicted: P, tokens predicted now.
        context: R, other unknown tokens that the decoder sees.
        diffusion_steps: reverse steps of a token that is not refined.
        refined: tokens per image that get ``refined_diffusion_steps`` instead (FTS).
        refined_diffusion_steps: 0 where nothing is refined.
        guidance: scale of this step; 1 means one branch only.
        branches: G, 2 with guidance, 1 without.
        flops: per image, without the VAE decoder.
    """

    index: int
    stage: int
    known: int
    predicted: int
    context: int
    diffusion_steps: int
    refined: int
    refined_diffusion_steps: int
    guidance: float
    branches: int
    backbone_flops: int
    head_flops: int

    @property
    def flops(self) -> int:
        """FLOPs of the step per image."""
        return self.backbone_flops + self.head_flops

    def parts(self, orders: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Positions known, predicted and seen beside them [B, V], [B, P], [B, R], of orders [B, L]."""
        seen = orders[:, : self.known + self.predicted + self.context]
        return np.split(seen, [self.known, self.known + self.predicted], axis=1)

    @property
    def head_calls(self) -> int:
        """Sequential diffusion step calls: refined and plain tokens end together, so the longer chain counts."""
        return max(self.diffusion_steps if self.refined < self.predicted else 0, self.refined_diffusion_steps)


@dataclass(frozen=True)
class SamplingPlan:
    """Settings resolved for one model: the list of AR steps, and whether the model makes pictures of the latents."""

    settings: FittedSettings
    steps: tuple[ARStep, ...]
    pictures: bool = True

    @property
    def flops(self) -> int:
        """FLOPs per image, without the VAE decoder."""
        return sum(step.flops for step in self.steps)

    @property
    def head_calls(self) -> int:
        """Sequential diffusion step calls of one batch."""
        return sum(step.head_calls for step in self.steps)


def preset(name: str, architecture: Architecture, defaults: Mapping[str, Any] | None = None) -> FittedSettings:
    """A preset of a model's family, by name; see :func:`fitted`.

    Raises:
        PlanError: unknown preset, or no such stages on this grid.
    """
    known = presets_of(family_of(architecture))
    if name not in known:
        raise PlanError(f"plan {name!r} is not one of {', '.join(known)}")
    return fitted(known[name], architecture, defaults)


def fitted(
    settings: PlanSettings, architecture: Architecture, defaults: Mapping[str, Any] | None = None
) -> FittedSettings:
    """Settings for one model: what they leave open comes from the model's own defaults, such as its published ``cfg``;
    AR steps and a ``max_timestep`` that are a preset's, not somebody's choice, are cut to what the model has.

    Raises:
        PlanError: no such stages on this grid, or defaults for what no model can have any.
    """
    values = dict(defaults or {})
    if unknown := sorted(set(values) - set(MODEL_DEFAULTS)):
        raise PlanError(f"a model cannot have defaults for {', '.join(unknown)}, only for {', '.join(MODEL_DEFAULTS)}")
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    given |= {name: values[name] for name in values if given[name] is None}
    own = presets_of(family_of(architecture)).get(settings.name)
    if own is not None and settings.stage_steps == own.stage_steps:  # not somebody's choice
        sets = stage_sets(architecture.grid, len(settings.stage_steps), settings.parity)
        given["stage_steps"] = tuple(min(n, len(part)) for n, part in zip(settings.stage_steps, sets, strict=True))
    if own is not None and own.max_timestep is not None and settings.max_timestep == own.max_timestep:
        given["max_timestep"] = min(values.get("max_timestep", own.max_timestep), own.max_timestep)
    left_open = {name for name in MODEL_DEFAULTS if given[name] is None}
    return FittedSettings(**{name: value for name, value in given.items() if name not in left_open})


def resolve(
    settings: PlanSettings, architecture: Architecture, defaults: Mapping[str, Any] | None = None
) -> SamplingPlan:
    """The AR steps of ``settings``, :func:`fitted`, on ``architecture``.

    Raises:
        PlanError: a setting is out of range or does not fit the model; one line that names it.
    """
    settings = fitted(settings, architecture, defaults)
    _check(settings)
    family = family_of(architecture)
    if settings.cfg != 1.0 and not family.conditioner.inputs:
        raise PlanError(f"cfg {settings.cfg:g}: {architecture.name} has nothing that it could be guided to; give 1")
    sizes = [len(members) for members in stage_sets(architecture.grid, len(settings.stage_steps), settings.parity)]
    wanted = zip(sizes, settings.stage_steps, strict=True)
    counts = [_stage_counts(index, *pair, settings.token_schedule) for index, pair in enumerate(wanted)]
    last_stage = len(sizes) - 1
    generation_steps = sum(settings.stage_steps[:-1]) if last_stage else settings.stage_steps[0]
    steps: list[ARStep] = []
    known, stage_end = 0, 0
    for stage, stage_counts in enumerate(counts):
        stage_end += sizes[stage]
        for predicted in stage_counts:
            reconstructing = stage == last_stage > 0
            if reconstructing:
                diffusion = settings.reconstruction_diffusion
                refined = refined_count(settings.fts, settings.fts_fraction, predicted)
            else:
                diffusion, refined = _generation_diffusion(settings, len(steps), generation_steps), 0
            after = known + predicted
            guidance = _guidance(settings, known, after, architecture.tokens)
            branches = 1 if guidance == 1.0 else 2
            seen_end = stage_end if settings.context == "compact" else architecture.tokens
            context = seen_end - after
            refined_steps = settings.fts_diffusion if refined else 0
            chain = (predicted - refined) * diffusion + refined * refined_steps
            steps.append(
                ARStep(
                    index=len(steps),
                    stage=stage,
                    known=known,
                    predicted=predicted,
                    context=context,
                    diffusion_steps=diffusion,
                    refined=refined,
                    refined_diffusion_steps=refined_steps,
                    guidance=guidance,
                    branches=branches,
                    backbone_flops=family.backbone_flops(architecture, known, predicted, context, branches),
                    head_flops=chain * family.head_flops(architecture, branches),
                )
            )
            known = after
    return SamplingPlan(settings, tuple(steps), architecture.decoder.makes_pictures)


def _generation_diffusion(settings: FittedSettings, step: int, total: int) -> int:
    """T_s = last + floor((first - last) * (G-1-s) / (G-1)) over G generation steps [paper; granularity: ours]."""
    first, last = settings.generation_diffusion
    if total == 1:
        return first
    return last + math.floor((first - last) * (total - 1 - step) / (total - 1))


def _guidance(settings: FittedSettings, known: int, after: int, total: int) -> float:
    """Scale of an AR step that goes from ``known`` to ``after`` of ``total`` tokens; 1 is none."""
    first, end = settings.guidance_interval
    if not first <= known / total < end:
        return 1.0
    if settings.cfg_schedule == "constant":
        return settings.cfg
    # models/mar.py clamps the masked count to at least 1 before it takes the scale, so that the very last step's scale
    # stays one token short of cfg.
    return 1.0 + (settings.cfg - 1.0) * min(after, total - (settings.token_schedule == "cosine")) / total


def _stage_counts(stage: int, size: int, steps: int, schedule: str) -> list[int]:
    """Tokens per AR step of one stage, none of them zero, together ``size``."""
    if not 1 <= steps <= size:
        raise PlanError(f"stage {stage + 1} has {size} tokens: its AR steps must be in 1..{size}, not {steps}")
    if schedule == "uniform":
        return [size * (t + 1) // steps - size * t // steps for t in range(steps)]
    counts: list[int] = []
    masked = size
    for t in range(steps):
        # models/mar.py, sample_tokens: at least one token now, at least one left for later; the last step takes all.
        left = math.floor(size * math.cos(math.pi / 2 * (t + 1) / steps))
        left = max(steps - 1 - t, min(masked - 1, left)) if t < steps - 1 else 0
        counts.append(masked - left)
        masked = left
    return counts


def _check(settings: FittedSettings) -> None:
    def whole(what: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise PlanError(f"{what} {value!r} is not a whole number")

    def number(what: str, value: Any, low: float, high: float) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise PlanError(f"{what} {value!r} is not in {low:g}..{high:g}")

    for what, numbers in (
        ("stage steps", settings.stage_steps),
        ("generation diffusion steps", settings.generation_diffusion),
    ):
        if not isinstance(numbers, tuple | list):
            raise PlanError(f"{what} {numbers!r} is not a list of whole numbers")
    if not settings.stage_steps:
        raise PlanError("stage steps are empty: give AR steps per stage, for example 24,6,2")
    for steps in settings.stage_steps:
        whole("stage steps", steps)
    for what, value, choices in (
        ("order", settings.order, ORDERS),
        ("parity", settings.parity, PARITIES),
        ("token schedule", settings.token_schedule, TOKEN_SCHEDULES),
        ("FTS rule", settings.fts, FTS_RULES),
        ("cfg schedule", settings.cfg_schedule, CFG_SCHEDULES),
        ("decoder context", settings.context, CONTEXTS),
    ):
        if value not in choices:
            raise PlanError(f"{what} {value!r} is not one of {', '.join(choices)}")
    whole("max timestep", settings.max_timestep)
    if not 0 <= settings.max_timestep < TRAINING_STEPS:
        raise PlanError(f"max timestep {settings.max_timestep} is not in 0..{TRAINING_STEPS - 1}")
    if len(settings.generation_diffusion) != 2:
        raise PlanError("generation diffusion steps are two numbers, first and last")
    for what, count in (
        *(("generation diffusion steps", count) for count in settings.generation_diffusion),
        ("reconstruction diffusion steps", settings.reconstruction_diffusion),
        ("FTS diffusion steps", settings.fts_diffusion),
    ):
        whole(what, count)
        try:
            kept_timesteps(count, settings.max_timestep)
        except PlanError as error:
            raise PlanError(f"{what}: {error}") from None
    number("FTS fraction", settings.fts_fraction, 0.0, 1.0)
    number("cfg", settings.cfg, 0.0, 100.0)
    number("temperature", settings.temperature, 0.0, 10.0)
    shares = settings.guidance_interval
    if not isinstance(shares, tuple | list) or len(shares) != 2:
        raise PlanError(f"guidance interval {shares!r} is not two shares of known tokens")
    for share in shares:
        number("guidance interval", share, 0.0, 1.0)
    if shares[0] >= shares[1]:
        raise PlanError(f"guidance interval {shares[0]:g}..{shares[1]:g} is empty; give cfg 1 for no guidance")
