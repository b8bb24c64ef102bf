"""Where randomness comes from: one image seed, one image. [ours]

The noise of a token is a pure function of (image seed, token position, diffusion index), and an image's token order one
of its seed alone. Neither depends on batch size, plan, other images or backend. The bits are NumPy's Philox counter
generator, whose stream is fixed across NumPy versions; the normals are made here (Box-Muller in float64), because
NumPy does not promise that its own normals stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

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
        words = np.empty((len(images), (count + 1) // 2), dtype=np.uint64)
        seeds = [self._seeds[image] for image in images.tolist()]
        for row, bits in enumerate(_bits(seeds, _TOKEN_NOISE, positions.tolist(), words.shape[1])):
            words[row] = bits
        return _normals(words)[:, :count].reshape(len(images), 1 + steps, self._channels)


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
    return next(_bits([checked_seed(seed)], _ORDER, [0], tokens))


def selection_priorities(seed: int, tokens: int) -> NDArray[np.uint64]:
    """One number per token [tokens] for the ``random`` selection rule."""
    return next(_bits([checked_seed(seed)], _SELECTION, [0], tokens))


def _bits(seeds: Sequence[int], stream: int, positions: Sequence[int], count: int) -> Iterator[NDArray[np.uint64]]:
    """``count`` words of each (seed, position): Philox's key is (seed, stream), and of its 256-bit counter the low 64
    bits run within a token and the next 64 are the position. One generator, since making one takes longer than what it
    is asked for."""
    generator = np.random.Philox(key=0)
    state: Any = generator.state
    key, counter = state["state"]["key"], state["state"]["counter"]
    for key[0], counter[1] in zip(seeds, positions, strict=True):
        key[1], counter[0] = stream, 0
        generator.state = state
        yield np.asarray(generator.random_raw(count), dtype=np.uint64)


_BLOCK = 1 << 13
"""Words whose normals are made at once: their intermediate values stay in the cache."""


def _normals(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Box-Muller along the last axis: each 64-bit word gives two normals from its two 32-bit halves."""
    normals = np.empty((words.size, 2), dtype=np.float32)
    flat = words.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        part = flat[start : start + _BLOCK]
        radius = np.sqrt(-2.0 * np.log(((part >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32))
        angle = (part & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
        normals[start : start + _BLOCK, 0] = radius * np.cos(angle)
        normals[start : start + _BLOCK, 1] = radius * np.sin(angle)
    return normals.reshape(*words.shape[:-1], -1)
