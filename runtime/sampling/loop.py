"""The sampling loop: AR steps around calls of the graphs. Reads like the paper; knows no engine and no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import BackendError
from ..models.conditioning import Arrays
from .chains import DiffusionChain, Floats, Integers, diffusion_chain
from .job import GenerationJob, Observer, StepResult
from .selection import SCORED_RULES, select


@dataclass(frozen=True)
class BackboneOutput:
    """z [G, B, P, D], what the diffusion head samples tokens from, as the backend's own handle, for itself alone."""

    shape: tuple[int, ...]
    value: Any


class NetworkCalls(Protocol):
    """The networks of one bundle, one call at a time."""

    @property
    def name(self) -> str: ...

    def backbone(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, conditioning: Arrays
    ) -> BackboneOutput:
        """Arguments as ``graphs.masked_generator_specs`` has them; the conditioning of G branches."""
        ...

    def detail(self, z: BackboneOutput) -> tuple[Floats, Floats]:
        """FTS score and ||z|| of the conditional branch, both [B, P]."""
        ...

    def denoise(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        """Runs a whole chain of reverse steps; x_0 [N, C] in the chain's row order."""
        ...


def generate_on_host(networks: NetworkCalls, job: GenerationJob, observer: Observer | None = None) -> Floats:
    """One batch of latents, float32 [B, L, C] in grid order.

    Raises:
        BackendError: a value is not finite.
    """
    settings, steps = job.plan.settings, job.plan.steps
    batch, total = job.orders.shape
    latents = np.zeros((batch, total, job.architecture.token_channels), dtype=np.float32)

    for step in steps:
        visible, predict, context = step.parts(job.orders)
        known = np.take_along_axis(latents, visible[:, :, None], axis=1)
        asked = {name: array[: step.branches] for name, array in job.conditioning.items()}
        z = networks.backbone(known, visible, predict, context, asked)
        check_shape("backbone", z.shape, (step.branches, *predict.shape, job.architecture.width))

        refined = np.zeros(predict.shape, dtype=bool)
        if step.refined:
            scored = settings.fts in SCORED_RULES and step.refined < step.predicted
            score, norm = networks.detail(z) if scored else (None, None)
            for values in (score, norm):
                if values is not None:
                    check_shape("detail_score", values.shape, predict.shape)
                    if not np.isfinite(values).all():
                        raise not_finite(step.index, len(steps), networks.name)
            refined = select(settings.fts, step.refined, predict, job.seeds, total, score, norm)

        chain = diffusion_chain(step, settings, predict, refined, job.noise)
        tokens = np.empty((batch * step.predicted, latents.shape[2]), dtype=np.float32)
        tokens[chain.rows] = networks.denoise(z, chain)
        if not np.isfinite(tokens).all():
            raise not_finite(step.index, len(steps), networks.name)
        np.put_along_axis(latents, predict[:, :, None], tokens.reshape(batch, step.predicted, -1), axis=1)
        if observer is not None:
            observer(StepResult(step, predict, refined, latents))
    return latents


def check_shape(kind: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises:
    BackendError: a graph gave another shape than it should, which NumPy might broadcast without a word.
    """
    if found != expected:
        raise BackendError(
            f"the {kind} graph gave the shape {list(found)}, expected {list(expected)}; gtr-export verify says more"
        )


def not_finite(step: int, steps: int, backend: str) -> BackendError:
    """The error for values that are not numbers, in the 0-based AR step ``step`` of ``steps``."""
    what = f"AR step {step + 1} of {steps} gave values that are not finite on backend {backend}"
    return BackendError(f"{what}; run gtr-export verify on the bundle, or use a bundle of higher precision")
