"""Noise that was recorded, for the sampler's own door: `NoiseSource`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gtr_deploy.runtime.errors import UsageError


class RecordedNoise:
    """Noise given as arrays: x_T [B, L, C] and, for each reverse step, [B, L, T, C]."""

    def __init__(self, initial: NDArray[np.float32], steps: NDArray[np.float32]) -> None:
        if initial.ndim != 3 or steps.ndim != 4 or steps.shape[:2] + steps.shape[3:] != initial.shape:
            shapes = f"{initial.shape} and {steps.shape}"
            raise UsageError(f"recorded noise must be [B, L, C] and [B, L, T, C], got {shapes}")
        self._initial, self._steps = initial, steps

    def draw(self, images: NDArray[np.int64], positions: NDArray[np.int64], steps: int) -> NDArray[np.float32]:
        if steps > self._steps.shape[2]:
            raise UsageError(f"the recorded noise has {self._steps.shape[2]} reverse steps, the plan asks for {steps}")
        first = self._initial[images, positions][:, None]
        return np.concatenate([first, self._steps[images, positions, :steps]], axis=1)
