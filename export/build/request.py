"""What is asked of a build, and what it did."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...runtime.errors import UsageError, printable
from ...runtime.models.graphs import PRECISIONS
from ..zoo import MODELS, ModelEntry
from .told import DECODERS

WEIGHTS = ("auto", "ema", "model")
"""Which weights of a checkpoint: EMA where the file has it, EMA, or the last ones of the training."""


@dataclass(frozen=True)
class CalibrationChoices:
    """How int8 and fp8 are calibrated: number of images, preset to sample with, layers to keep (``auto`` or a number),
    threads of one call."""

    images: int = 64
    plan: str = "gtr"
    keep: int | str = "auto"
    threads: int | None = None


AUTO = "auto"
"""In place of a model's name: the sizes are found in the checkpoint (own_model.py)."""


@dataclass(frozen=True)
class OwnModel:
    """What a person says of a model that has no name here, each only where the file does not: a name for it, attention
    heads, latent cells along a token's side, (rows, columns) of tokens, the decoder (of ``told.DECODERS``),
    what latents were multiplied by after something was subtracted, and that classes are left out. ``none`` leaves any
    model's decoder out."""

    name: str | None = None
    heads: int | None = None
    patch_size: int | None = None
    grid: tuple[int, int] | None = None
    decoder: str | None = None
    latent_scale: float | None = None
    latent_shift: float | None = None
    unconditional: bool = False


@dataclass(frozen=True)
class BuildRequest:
    """What to build; the defaults are the command's.

    Attributes:
        model: a name of the zoo, or :data:`AUTO`.
        own: only with :data:`AUTO`.
        class_names: file of the classes' names, instead of the model's.
        plan_defaults: what every plan of the bundle starts from (``sampling.plan.MODEL_DEFAULTS``), before the model's.
        found: sizes, conditioner and defaults, once they are known (``own_model.resolved``); None for the zoo's.
    """

    model: str
    out: Path
    checkpoint: Path | None = None
    vae: Path | None = None
    random_weights: bool = False
    precision: str = "fp32"
    max_batch: int = 8
    force: bool = False
    calibration: CalibrationChoices = CalibrationChoices()
    weights: str = "auto"
    own: OwnModel = OwnModel()
    class_names: Path | None = None
    found: ModelEntry | None = None
    plan_defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the bundle calls the model: the zoo's name, the one given, or the checkpoint's without suffix."""
        if self.model != AUTO:
            return self.model
        return self.own.name or (self.checkpoint.stem if self.checkpoint else AUTO)

    def check(self) -> None:
        """Raises a UsageError for an unknown model or precision, contradicting or senseless options."""
        if self.model == AUTO:
            if self.checkpoint is None:
                raise UsageError("give --model NAME, or --checkpoint FILE of a model of your own")
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", self.name):
                shown = printable(self.name, 60)
                raise UsageError(f"{shown!r} is no name for a model (letters, digits, . _ -); give one with --name")
        elif self.model not in MODELS:
            raise UsageError(f"model {self.model!r} is not one of {', '.join(MODELS)}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.random_weights and self.checkpoint is not None:
            raise UsageError("--random-weights and --checkpoint contradict each other; give one of them")
        if self.weights not in WEIGHTS:
            raise UsageError(f"--weights {self.weights!r} is not one of {', '.join(WEIGHTS)}")
        if self.random_weights and self.weights != "auto":
            raise UsageError(f"--random-weights and --weights {self.weights} contradict each other; give one of them")
        if not 1 <= self.max_batch <= 4096:
            raise UsageError(f"--max-batch {self.max_batch} is not in 1..4096")
        self._check_own()
        entry = self.found or MODELS.get(self.model)
        if self.vae is not None and entry is not None and entry.vae is None:
            raise UsageError(f"{self.name} has no VAE; leave --vae out")

    def _check_own(self) -> None:
        own, without = self.own, self.own.decoder == "none"
        if self.model != AUTO and own != OwnModel(decoder="none" if without else None):
            options = (
                "--name, --heads, --patch-size, --grid, --unconditional, --decoder, --latent-scale and --latent-shift"
            )
            raise UsageError(f"{options} are for models without a name here, not for {self.model}")
        if own.decoder not in (None, *DECODERS):
            raise UsageError(f"--decoder {own.decoder!r} is not one of {', '.join(DECODERS)}")
        no_vae = "--no-decoder" if without else "--decoder pixels" if own.decoder == "pixels" else ""
        scaled = own.latent_scale is not None or own.latent_shift is not None
        if no_vae and (self.vae is not None or scaled):
            other = "--vae" if self.vae is not None else "--latent-scale or --latent-shift"
            raise UsageError(f"{no_vae} and {other} contradict each other; give one of them")
        if own.latent_scale is not None and not 0 < own.latent_scale <= 1e6:
            raise UsageError(f"--latent-scale {own.latent_scale:g} is not a number above 0")
        if own.latent_shift is not None and not abs(own.latent_shift) <= 1e6:
            raise UsageError(f"--latent-shift {own.latent_shift:g} is out of range")

    def entry(self) -> ModelEntry:
        """The model: what was found, or the zoo's entry.

        Raises:
            UsageError: see :meth:`check`.
        """
        self.check()
        assert self.found is not None or self.model in MODELS, "own_model.resolved comes first"
        return self.found or MODELS[self.model]


@dataclass
class BuildResult:
    """What a build did: stage name to ``built`` or ``cached``, and the size of the graphs."""

    bundle: Path
    stages: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    @property
    def unchanged(self) -> bool:
        """Nothing had to be done."""
        return all(state == "cached" for state in self.stages.values())


def default_out(request: BuildRequest) -> Path:
    """``bundles/mar-h-fp16``, ``bundles/mar-h-random-fp16``, or without a decoder ``bundles/mar-h-latents-fp16``."""
    words = (("random", request.random_weights), ("latents", request.own.decoder == "none"))
    return Path("bundles") / "-".join([request.name, *(word for word, said in words if said), request.precision])
