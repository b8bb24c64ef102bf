"""What one batch's generation depends on, and what those who watch it see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..models.architecture import Architecture
from ..models.conditioning import Arrays
from .chains import Floats, Integers
from .noise import NoiseSource
from .orders import generation_orders
from .plan import ARStep, SamplingPlan


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


Observer = Callable[[StepResult], None]
"""Called after each AR step: progress bars, traces."""


@dataclass(frozen=True)
class GenerationJob:
    """One batch.

    Attributes:
        plan: resolved for the architecture.
        conditioning: the backbone's inputs that say what the images are, by name, each [2, B, ...]: what was asked for,
            and the unconditional branch.
        orders: int64 [B, L], positions in the order they are made.
        seeds: B image seeds, for the ``random`` selection rule.
        noise: of every token.
    """

    plan: SamplingPlan
    architecture: Architecture
    conditioning: Arrays
    orders: Integers
    seeds: Sequence[int]
    noise: NoiseSource


def orders_of(plan: SamplingPlan, architecture: Architecture, seeds: Sequence[int]) -> Integers:
    """The seeds' own token orders, int64 [B, L]."""
    settings = plan.settings
    return generation_orders(settings.order, architecture.grid, len(settings.stage_steps), settings.parity, seeds)


def generation_job(
    plan: SamplingPlan,
    architecture: Architecture,
    conditioning: Arrays,
    seeds: Sequence[int],
    noise: NoiseSource,
    orders: Integers | None = None,
) -> GenerationJob:
    """A :class:`GenerationJob`, its orders from the seeds where none are given.

    Raises:
        UsageError: orders are not permutations.
    """
    batch, total = len(seeds), architecture.tokens
    if orders is None:
        orders = orders_of(plan, architecture, seeds)
    if orders.shape != (batch, total) or not (np.sort(orders, axis=1) == np.arange(total)).all():
        raise UsageError(f"orders must be [{batch}, {total}], each row a permutation of 0..{total - 1}")
    return GenerationJob(plan, architecture, conditioning, orders, seeds, noise)
