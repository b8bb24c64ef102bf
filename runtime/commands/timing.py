"""How long generations take, and where the time goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.protocol import GraphCall
from ..errors import UsageError
from ..pipeline import Pipeline
from ..sampling.plan import SamplingPlan

_PART_OF = {
    "backbone": "backbone",
    "detail_score": "backbone",
    "modulation": "head",
    "diffusion_step": "head",
    "decoder": "decoder",
}
PARTS = ("backbone", "head", "decoder", "host")


@dataclass(frozen=True)
class Measurement:
    """One plan at one batch size.

    Attributes:
        seconds: per repetition, whole batch, decoder included, warm-up left out.
        shares: see :func:`part_shares`; of one generation more.
        peak_memory: highest resident memory of the process so far, bytes.
    """

    plan: str
    batch_size: int
    seconds: tuple[float, ...]
    shares: dict[str, float]
    peak_memory: int
    flops: int

    @property
    def median(self) -> float:
        """Median seconds per batch."""
        return float(np.median(self.seconds))

    @property
    def images_per_second(self) -> float:
        """Throughput at the median."""
        return self.batch_size / self.median

    def to_json(self) -> dict[str, Any]:
        """All fields and the derived figures."""
        p5, p95 = map(float, np.percentile(self.seconds, [5, 95]))
        figures = {"median": self.median, "p5": p5, "p95": p95, "images_per_second": self.images_per_second}
        return {**asdict(self), "seconds": list(self.seconds), **figures}


def measure(pipeline: Pipeline, plan: SamplingPlan, batch_size: int, repeat: int) -> Measurement:
    """Warm-up, then ``repeat`` generations of one batch, then one that is watched.

    Raises:
        UsageError: ``repeat`` or ``batch_size`` is below 1.
    """
    if repeat < 1 or batch_size < 1:
        raise UsageError(f"repeat {repeat} and batch size {batch_size} must be at least 1")
    requests = pipeline.conditioner.samples(batch_size)

    def generation(index: int) -> float:
        seeds = list(range(index * batch_size, (index + 1) * batch_size))
        start = time.perf_counter()
        pipeline.generate(requests, seeds=seeds, plan=plan, batch_size=batch_size)
        return time.perf_counter() - start

    pipeline.warm_up(plan, batch_size)
    generation(0)
    seconds = tuple(generation(index) for index in range(repeat))
    shares = part_shares(pipeline, lambda: generation(0))
    return Measurement(plan.settings.name, batch_size, seconds, shares, peak_memory(), plan.flops * batch_size)


def part_shares(pipeline: Pipeline, generation: Callable[[], float]) -> dict[str, float]:
    """Share of a generation's time per part of :data:`PARTS`; ``host`` is everything outside engine calls.

    A backend that runs whole generations on a device plays them in parts, one after the other.

    Args:
        generation: makes it; returns its seconds.
    """
    spent: dict[str, float] = dict.fromkeys(PARTS[:-1], 0.0)

    def add(call: GraphCall) -> None:
        spent[_PART_OF[call.kind]] += call.seconds

    backend, earlier = pipeline.backend, pipeline.backend.hook
    backend.hook = add
    try:
        total = generation()
    finally:
        backend.hook = earlier
    total = max(total, sum(spent.values()))
    shares = {part: seconds / total for part, seconds in spent.items()}
    return {**shares, "host": 1.0 - sum(shares.values())}


def peak_memory() -> int:
    """Highest resident memory of this process, bytes; 0 where the system does not tell."""
    try:
        # On Linux getrusage also counts what the process that started this one had at that moment.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
