"""Where arrays lie in one stretch of memory, on the host and on a device. Knows NumPy and no library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 256
"""Bytes; what TensorRT's setTensorAddress asks for, and what cudaMalloc guarantees."""


def padded(size: int) -> int:
    """``size`` rounded up to a multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Block:
    """One array in an area.

    Attributes:
        offset: bytes from the area's start.
        stride: bytes from one entry of the first axis to the next; None for a dense array.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: type[Any]
    stride: int | None = None

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry of the first axis, without padding."""
        return int(np.prod(self.shape[1:])) * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Bytes from the first to the end of the last entry, padding included."""
        if self.stride is not None:
            return self.shape[0] * self.stride
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def at(self, base: int, index: int = 0) -> int:
        """Address of the ``index``-th entry of the first axis of a padded block, in an area that starts at ``base``."""
        return base + self.offset + (index * self.stride if self.stride else 0)

    def view(self, area: NDArray[np.uint8]) -> NDArray[Any]:
        """The array as a view of a host copy of its area."""
        raw = area[self.offset : self.offset + self.bytes]
        if self.stride is None:
            return raw.view(self.dtype).reshape(self.shape)
        return raw.reshape(self.shape[0], self.stride)[:, : self.entry_bytes].view(self.dtype).reshape(self.shape)


class Area:
    """Hands out blocks one after another; ``size`` is what must be allocated, in bytes."""

    def __init__(self) -> None:
        self.size = 0

    def block(self, dtype: type[Any], *shape: int, steps: bool = False) -> Block:
        """A new block; with ``steps`` its first axis has a padded stride."""
        dense = Block(self.size, shape, dtype)
        made = Block(self.size, shape, dtype, padded(dense.entry_bytes)) if steps else dense
        self.size += padded(max(made.bytes, 1))
        return made


def packed(arrays: Sequence[NDArray[Any]]) -> tuple[list[Block], NDArray[np.uint8]]:
    """The blocks of arrays in one area, entries along the first axis aligned, and the area's content."""
    area = Area()
    blocks = [area.block(array.dtype.type, *array.shape, steps=True) for array in arrays]
    content = np.zeros(area.size, np.uint8)
    for block, array in zip(blocks, arrays, strict=True):
        block.view(content)[...] = array
    return blocks, content
