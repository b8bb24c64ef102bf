"""One graph at one shape, called with plain arrays: for decoding, and for verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError
from ...machine.cuda import Cuda, PinnedBuffer
from ...models.graphs import GraphSpec
from ..blocks import Area, Block
from .contexts import Contexts
from .engine import EngineCall


class SingleCall:
    """Its context, and its buffers on both sides: a call is one upload, one enqueue, one download."""

    def __init__(
        self, cuda: Cuda, stream: int, contexts: Contexts, kind: str, spec: GraphSpec, sizes: Mapping[str, int]
    ) -> None:
        """Raises BackendError where a profile or memory is missing."""
        self._cuda, self._stream, self._contexts = cuda, stream, contexts
        self._areas: list[tuple[int, PinnedBuffer]] = []
        self._calls: list[EngineCall] = contexts.take([(kind, sizes)])
        sides = (Area(), {}), (Area(), {})
        for (area, blocks), tensors in zip(sides, (spec.inputs, spec.outputs), strict=True):
            for tensor in tensors:
                blocks[tensor.name] = area.block(np.dtype(tensor.dtype).type, *tensor.shape(sizes))
        self._blocks: tuple[dict[str, Block], dict[str, Block]] = sides[0][1], sides[1][1]
        try:
            for area, _ in sides:
                address = cuda.allocate(area.size)
                try:
                    self._areas.append((address, cuda.allocate_pinned(area.size)))
                except BaseException:
                    cuda.free(address)
                    raise
        except BaseException:
            self.close()
            raise

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs in the graph's order."""
        cuda, stream, (given, made) = self._cuda, self._stream, self._blocks
        (source, upload), (target, download) = self._areas
        cuda.synchronize(stream)  # a call that failed may still be reading the buffer
        for name, block in given.items():
            if inputs[name].shape != block.shape:
                raise BackendError(f"{name} has the shape {list(inputs[name].shape)}, not {list(block.shape)}")
            block.view(upload.array)[...] = inputs[name]
        cuda.upload(source, upload.address, upload.array.size, stream)
        addresses = {name: block.at(source) for name, block in given.items()}
        self._calls[0].enqueue(addresses | {name: block.at(target) for name, block in made.items()}, stream)
        cuda.download(download.address, target, download.array.size, stream)
        cuda.synchronize(stream)
        return [block.view(download.array).copy() for block in made.values()]

    def close(self) -> None:
        """Frees everything; nothing of it may still be running."""
        for address, buffer in self._areas:
            self._cuda.free(address)
            self._cuda.free_pinned(buffer)
        self._contexts.give_back(self._calls)
        self._areas, self._calls = [], []
