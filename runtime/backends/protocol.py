"""What a backend does for the sampler. The sampler says what to run; a backend owns how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError
from ..sampling.noise import NoiseSource
from ..sampling.plan import ARStep, SamplingPlan

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


CUDA_GRAPH_MODES = ("auto", "generation", "step", "off")
"""What is captured: whole generations, or single AR steps where somebody watches (auto); or always the one named."""


@dataclass(frozen=True)
class Condition:
    """Condition vectors z [G, B, P, D] where the backend keeps them; only that backend may look inside.

    Attributes:
        shape: (G, B, P, D).
        value: the backend's own handle.
    """

    shape: tuple[int, int, int, int]
    value: Any


@dataclass(frozen=True)
class ChainSegment:
    """Consecutive reverse steps over the same rows.

    Attributes:
        rows: n; the first n rows of the chain take part.
        timesteps: int64 [S, n].
        coefficients: float32 [S, n, K], see ``diffusion.COEFFICIENTS``.
        noise: float32 [S, n, C].
    """

    rows: int
    timesteps: Integers
    coefficients: Floats
    noise: Floats


@dataclass(frozen=True)
class DiffusionChain:
    """All reverse steps of one AR step. Rows are sorted by falling step count and end together, so that rows with 50
    and with 20 steps cost 50 calls, not 70.

    Attributes:
        rows: int64 [N], for each row of the chain its row in z seen as [G, B * P, D].
        x: float32 [N, C], x_T of each row.
        guidance: float32 [N].
        segments: in the order they run; row counts never fall.
    """

    rows: Integers
    x: Floats
    guidance: Floats
    segments: tuple[ChainSegment, ...]


@dataclass(frozen=True)
class StepResult:
    """What an observer sees after each AR step.

    Attributes:
        step: the plan's entry.
        predicted: int64 [B, P], positions made in this step.
        refined: bool [B, P], those that got extra diffusion steps.
        latents: float32 [B, L, C], a view: all tokens so far, zeros elsewhere.
    """

    step: ARStep
    predicted: Integers
    refined: NDArray[np.bool_]
    latents: Floats


class Observer(Protocol):
    """Called after each AR step: progress bars, traces."""

    def __call__(self, result: StepResult) -> None: ...


@dataclass(frozen=True)
class GenerationJob:
    """Everything that one batch's generation depends on.

    Attributes:
        plan: resolved for the model.
        orders: int64 [B, L], positions in the order they are made.
        labels: int64 [2, B], classes and null labels.
        seeds: B image seeds.
        noise: the noise of every token.
    """

    plan: SamplingPlan
    orders: Integers
    labels: Integers
    seeds: Sequence[int]
    noise: NoiseSource


class Backend(Protocol):
    """Runs the networks of one bundle, one call at a time; the sampler's loop runs on the host."""

    name: str

    def condition(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, labels: Integers
    ) -> Condition:
        """The backbone; arguments as ``graphs.graph_specs`` has them. z stays with the backend."""
        ...

    def detail(self, condition: Condition) -> tuple[Floats, Floats]:
        """FTS score and ||z|| of the conditional branch, both [B, P]."""
        ...

    def denoise(self, condition: Condition, chain: DiffusionChain) -> Floats:
        """Runs a whole chain of reverse steps; x_0 [N, C] in the chain's row order."""
        ...

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        """Latents [B, L, C] to RGB [B, H, W, 3]."""
        ...


@runtime_checkable
class DeviceBackend(Protocol):
    """Runs whole generations by itself, so that nothing but finished latents comes back to the host."""

    name: str

    def generate(self, job: GenerationJob, observer: Observer | None = None) -> Floats:
        """One batch of latents [B, L, C] in grid order, as sampler.py's own loop would make them."""
        ...

    def warm_up(self, plan: SamplingPlan, batch: int) -> None:
        """Does beforehand what the first generations of this plan and batch size would have to wait for."""
        ...

    def part_seconds(self, plan: SamplingPlan, batch: int) -> dict[str, float]:
        """Seconds of ``backbone`` and ``head`` in one generation, apart from each other."""
        ...

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        """Latents [B, L, C] to RGB [B, H, W, 3]."""
        ...


def not_finite(step: int, steps: int, backend: str) -> BackendError:
    """The error for values that are not numbers, in the 0-based AR step ``step`` of ``steps``."""
    return BackendError(
        f"AR step {step + 1} of {steps} gave values that are not finite on backend "
        f"{backend}; run gtr-export verify on the bundle, or use a bundle of higher precision"
    )
