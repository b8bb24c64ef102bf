"""Where randomness comes from: one image seed, one image. [ours]

The noise of a token is a pure function of (image seed, token position, diffusion index), and an image's token order one
of its seed alone. Neither depends on batch size, plan, other images or backend. The bits are NumPy's Philox counter
generator, whose stream is fixed across NumPy versions; the normals are made here (Box-Muller in float64), because
NumPy does not promise that its own normals stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

_TOKEN_NOISE, _ORDER, _SELECTION = 0, 1, 2


class NoiseSource(Protocol):
    """What the sampler asks for; tests replay recorded noise through the same door."""

    def draw(self, images: NDArray[np.int64], positions: NDArray[np.int64], steps: int) -> NDArray[np.float32]:
        """Standard normal [n, 1 + steps, C] of n tokens: token ``positions[i]`` of image ``images[i]`` of the batch.

        Row 0 is x_T; row 1 + k is for the k-th reverse step, k = 0 the one at the largest timestep.
        """
        ...


class SeededNoise:
    """Noise from one seed per image."""

    def __init__(self, seeds: Sequence[int], channels: int) -> None:
        self._seeds = [checked_seed(seed) for seed in seeds]
        self._channels = channels

    def draw(self, images: NDArray[np.int64], positions: NDArray[np.int64], steps: int) -> NDArray[np.float32]:
        count = (1 + steps) * self._channels
        bits = np.empty((len(images), (count + 1) // 2), dtype=np.uint64)
        for row, (image, position) in enumerate(zip(images.tolist(), positions.tolist(), strict=True)):
            bits[row] = _bits(self._seeds[image], _TOKEN_NOISE, position, bits.shape[1])
        return _normals(bits)[:, :count].reshape(len(images), 1 + steps, self._channels)


def checked_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        UsageError: it is not an integer in 0..2^64-1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= int(seed) < 2**64:
        raise UsageError(f"seed {seed!r} is not an integer in 0..2^64-1")
    return int(seed)


def order_priorities(seed: int, tokens: int) -> NDArray[np.uint64]:
    """One number per token [tokens]; sorting by them gives the image's random order, whatever subset is sorted."""
    return _bits(checked_seed(seed), _ORDER, 0, tokens)


def selection_priorities(seed: int, tokens: int) -> NDArray[np.uint64]:
    """One number per token [tokens] for the ``random`` selection rule."""
    return _bits(checked_seed(seed), _SELECTION, 0, tokens)


def _bits(seed: int, stream: int, position: int, count: int) -> NDArray[np.uint64]:
    # 256-bit counter: the low 64 bits run within a token, the next ones are the position.
    generator = np.random.Philox(key=seed | stream << 64, counter=position << 64)
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def _normals(bits: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Box-Muller along the last axis: each 64-bit word gives two normals from its two 32-bit halves."""
    radius = np.sqrt(-2.0 * np.log(((bits >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32))
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(*bits.shape[:-1], -1).astype(np.float32)
