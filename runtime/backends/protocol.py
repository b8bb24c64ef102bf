"""What a backend does: whole generations, pictures, and single graphs for verification. How is its own business."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..sampling.chains import Floats
from ..sampling.job import GenerationJob, Observer
from ..sampling.plan import SamplingPlan

CUDA_GRAPH_MODES = ("auto", "generation", "step", "off")
"""What is captured: whole generations, or single AR steps where somebody watches (auto); or always the one named."""


@dataclass(frozen=True)
class GraphCall:
    """One call of a graph that has ended, for those who watch.

    Attributes:
        kind: of the graph. A backend that keeps many calls on a device tells of them as one.
        inputs, outputs: arrays, where they were on the host; good until the hook returns.
        seconds: what it took.
    """

    kind: str
    inputs: Mapping[str, NDArray[Any]]
    outputs: Sequence[NDArray[Any]]
    seconds: float


CallHook = Callable[[GraphCall], None]

Outputs = TypeVar("Outputs", bound=Sequence[Any])


def hooked(
    hook: CallHook | None, kind: str, inputs: Mapping[str, NDArray[Any]], call: Callable[[], Outputs]
) -> Outputs:
    """A call that the hook, if there is one, gets to see."""
    if hook is None:
        return call()
    start = time.perf_counter()
    outputs = call()
    hook(GraphCall(kind, inputs, outputs, time.perf_counter() - start))
    return outputs


class Backend(Protocol):
    """Runs one bundle's graphs with one library.

    Attributes:
        name: of the library.
        hook: called after every graph call; timing, calibration and recording are hooks. A backend that runs whole
            generations on a device is slower while it is hooked.
        whole_generations: generations run on a device in one piece, so that observing them costs time.
    """

    name: str
    hook: CallHook | None
    whole_generations: bool

    @property
    def description(self) -> str:
        """Library, device and what else decides the speed; one line."""
        ...

    def generate(self, job: GenerationJob, observer: Observer | None = None) -> Floats:
        """One batch of latents, float32 [B, L, C] in grid order.

        Raises:
            BackendError: a graph fails, or a value is not finite.
        """
        ...

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        """Latents [B, L, C] to RGB [B, H, W, 3]."""
        ...

    def warm_up(self, plan: SamplingPlan, batch: int) -> None:
        """Does beforehand what the first generations of this plan and batch size would have to wait for."""
        ...

    def run(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One graph call with plain arrays, outputs in the graph's order.

        Raises:
            BackendError: the graph is not there, or the call fails.
        """
        ...

    def close(self) -> None:
        """Gives a device's memory back; nothing works after this."""
        ...
