"""Respaced DDPM tables for the diffusion head, in float64 NumPy.

Source: the original MAR code's diffusion/respace.py and diffusion/gaussian_diffusion.py (improved-diffusion lineage).
Does not know the network: a reverse step is ``graphs.COEFFICIENTS`` numbers per token, applied in the graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError

TRAINING_STEPS = 1000
"""Diffusion timesteps that MAR is trained with."""


def cosine_betas(steps: int = TRAINING_STEPS) -> NDArray[np.float64]:
    """Betas [steps] of the cosine schedule, alpha_bar(t) = cos^2((t+.008)/1.008*pi/2), capped at 0.999."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)])


def kept_timesteps(count: int, max_timestep: int = TRAINING_STEPS - 1) -> list[int]:
    """The ``count`` original timesteps that are kept, ascending, from 0 to ``max_timestep``.

    The fractional stride of the original respace.py; ``max_timestep`` below 999 leaves out the steps where alpha_bar
    is so small that a tiny error of the network is multiplied by hundreds (the cap is DiSA's; an option here).

    Raises:
        PlanError: ``count`` is not in 1..max_timestep+1, or ``max_timestep`` not in 0..999.
    """
    if not 0 <= max_timestep < TRAINING_STEPS:
        raise PlanError(f"max timestep {max_timestep} is not in 0..{TRAINING_STEPS - 1}")
    if not 1 <= count <= max_timestep + 1:
        raise PlanError(f"{count} diffusion steps cannot be kept out of timesteps 0..{max_timestep}")
    if count == 1:
        # The original's stride for a single step keeps t=0 only, denoising nothing; start noisiest [ours].
        return [max_timestep]
    strides = [max_timestep / (count - 1)] * (count - 1)
    return [round(position) for position in accumulate(strides, initial=0.0)]


@dataclass(frozen=True)
class ReverseProcess:
    """The reverse steps of one respacing, in the order they run (largest timestep first).

    Attributes:
        timesteps: int64 [T], original indices, what the head is told.
        coefficients: float32 [T, len(graphs.COEFFICIENTS)].
    """

    timesteps: NDArray[np.int64]
    coefficients: NDArray[np.float32]

    @property
    def steps(self) -> int:
        """T, the number of reverse steps."""
        return len(self.timesteps)

    def part(self, start: int, stop: int | None = None) -> ReverseProcess:
        """Some consecutive steps."""
        return ReverseProcess(self.timesteps[start:stop], self.coefficients[start:stop])


@lru_cache(maxsize=256)
def reverse_process(count: int, max_timestep: int = TRAINING_STEPS - 1, temperature: float = 1.0) -> ReverseProcess:
    """Tables of ``count`` reverse steps (models/diffloss.py ``sample``; gaussian_diffusion.py ``p_sample``).

    Betas are recomputed from the kept alpha_bars. The last step gets no noise; x_T is not scaled by the temperature.

    Raises:
        PlanError: see :func:`kept_timesteps`; or the temperature is not finite or is negative.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise PlanError(f"temperature {temperature} is not a finite number >= 0")
    kept = kept_timesteps(count, max_timestep)
    kept_alpha_bars = np.cumprod(1.0 - cosine_betas())[kept]
    betas = 1.0 - kept_alpha_bars / np.append(1.0, kept_alpha_bars[:-1])
    alphas = 1.0 - betas
    alpha_bar = np.cumprod(alphas)
    previous = np.append(1.0, alpha_bar[:-1])
    posterior_variance = betas * (1.0 - previous) / (1.0 - alpha_bar)
    first = posterior_variance[1] if count > 1 else betas[0]
    log_variance = np.log(np.append(first, posterior_variance[1:]))
    noise_scale = np.full(count, temperature)
    noise_scale[0] = 0.0
    table = np.stack(
        [
            np.sqrt(1.0 / alpha_bar),
            np.sqrt(1.0 / alpha_bar - 1.0),
            betas * np.sqrt(previous) / (1.0 - alpha_bar),
            (1.0 - previous) * np.sqrt(alphas) / (1.0 - alpha_bar),
            log_variance,
            np.log(betas),
            noise_scale,
        ],
        axis=1,
    )
    timesteps = np.array(kept[::-1], dtype=np.int64)
    coefficients = np.ascontiguousarray(table[::-1].astype(np.float32))
    timesteps.setflags(write=False)
    coefficients.setflags(write=False)
    return ReverseProcess(timesteps, coefficients)
