"""What is asked of a build, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...runtime.errors import UsageError
from ...runtime.models.graphs import PRECISIONS
from ..zoo import MODELS, ModelEntry

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


@dataclass(frozen=True)
class BuildRequest:
    """What to build; the defaults are the command's."""

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

    def entry(self) -> ModelEntry:
        """The zoo's entry.

        Raises:
            UsageError: unknown model or precision, contradicting or senseless options.
        """
        if self.model not in MODELS:
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
        entry = MODELS[self.model]
        if self.vae is not None and entry.vae is None:
            raise UsageError(f"{self.model} has no VAE; leave --vae out")
        return entry


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


def default_out(model: str, precision: str, random_weights: bool) -> Path:
    """``bundles/mar-h-fp16``, or ``bundles/mar-h-random-fp16``."""
    return Path("bundles") / "-".join([model, *(["random"] if random_weights else []), precision])
