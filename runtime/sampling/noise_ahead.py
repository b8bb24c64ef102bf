"""Noise that is drawn in a thread while a device works on the batch before. Bit for bit the noise of the seeds. [ours]

For backends that take a generation's noise at once: there a host that draws is a device that waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ..models.architecture import Architecture
from .chains import Floats, Integers, device_draw
from .job import orders_of
from .noise import NoiseSource, SeededNoise
from .plan import SamplingPlan

_Key = tuple[bytes, bytes, int]


def noise_ahead(
    batches: Iterable[tuple[Sequence[int], Integers | None]], plan: SamplingPlan, architecture: Architecture
) -> Iterator[NoiseSource]:
    """The noise of each batch (seeds, token orders or None for the seeds' own), drawn one batch ahead."""
    worker = ThreadPoolExecutor(1, "noise")
    drawn: deque[NoiseSource] = deque()
    try:
        for seeds, orders in batches:
            source = SeededNoise(seeds, architecture.token_channels)
            drawn.append(_Drawn(source, worker.submit(_all_draws, source, seeds, orders, plan, architecture)))
            if len(drawn) > 1:
                yield drawn.popleft()
        yield from drawn
    finally:
        worker.shutdown(wait=False, cancel_futures=True)


class _Drawn:
    """A batch's noise that is there already; what else is asked for is drawn."""

    def __init__(self, source: NoiseSource, draws: Future[dict[_Key, Floats]]) -> None:
        self._source, self._draws = source, draws

    def draw(self, images: Integers, positions: Integers, steps: int) -> Floats:
        found = self._draws.result().pop(_key(images, positions, steps), None)
        return self._source.draw(images, positions, steps) if found is None else found


def _all_draws(
    source: NoiseSource,
    seeds: Sequence[int],
    orders: Integers | None,
    plan: SamplingPlan,
    architecture: Architecture,
) -> dict[_Key, Floats]:
    if orders is None:
        orders = orders_of(plan, architecture, seeds)
    draws = {}
    for step in plan.steps:
        _, predict, _ = step.parts(orders)
        asked = device_draw(step, predict)
        draws[_key(*asked)] = source.draw(*asked)
    return draws


def _key(images: Integers, positions: Integers, steps: int) -> _Key:
    return images.tobytes(), positions.tobytes(), steps
