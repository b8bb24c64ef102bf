"""How long generations take, and where the time goes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.protocol import (
    Backend,
    Condition,
    DeviceBackend,
    DiffusionChain,
    Floats,
    GenerationJob,
    Integers,
    Observer,
)
from ..errors import UsageError
from ..pipeline import Pipeline
from ..sampling.plan import SamplingPlan

PARTS = ("backbone", "head", "decoder", "host")


class TimedBackend:
    """A backend that adds up the seconds spent in each part."""

    def __init__(self, inner: Backend) -> None:
        self.name = inner.name
        self.seconds: dict[str, float] = dict.fromkeys(PARTS[:-1], 0.0)
        self._inner = inner

    def _timed(self, part: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.seconds[part] += time.perf_counter() - start

    def condition(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, labels: Integers
    ) -> Condition:
        return self._timed("backbone", self._inner.condition, tokens, visible, predict, context, labels)

    def detail(self, condition: Condition) -> tuple[Floats, Floats]:
        return self._timed("backbone", self._inner.detail, condition)

    def denoise(self, condition: Condition, chain: DiffusionChain) -> Floats:
        return self._timed("head", self._inner.denoise, condition, chain)

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        return self._timed("decoder", self._inner.decode, latents)


class TimedDeviceBackend:
    """The same for a backend that runs whole generations: their seconds are told apart afterwards."""

    def __init__(self, inner: DeviceBackend) -> None:
        self.name = inner.name
        self.seconds: dict[str, float] = dict.fromkeys(PARTS[:-1], 0.0)
        self._inner = inner
        self._weights = {"backbone": 0.5, "head": 0.5}

    def generate(self, job: GenerationJob, observer: Observer | None = None) -> Floats:
        start = time.perf_counter()
        latents = self._inner.generate(job, observer)
        spent = time.perf_counter() - start
        for part, weight in self._weights.items():
            self.seconds[part] += weight * spent
        return latents

    def warm_up(self, plan: SamplingPlan, batch: int) -> None:
        parts = self._inner.part_seconds(plan, batch)
        self._weights = {part: value / sum(parts.values()) for part, value in parts.items()}
        self._inner.warm_up(plan, batch)

    def part_seconds(self, plan: SamplingPlan, batch: int) -> dict[str, float]:
        return self._inner.part_seconds(plan, batch)

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        start = time.perf_counter()
        image = self._inner.decode(latents)
        self.seconds["decoder"] += time.perf_counter() - start
        return image


@dataclass(frozen=True)
class Measurement:
    """One plan at one batch size.

    Attributes:
        seconds: per repetition, whole batch, decoder included, warm-up left out.
        shares: share of the total time per part; ``host`` is everything outside engine calls. Where the device runs
            whole generations, filling its inputs counts as theirs, and backbone and head share their time as they
            did in one run without CUDA graphs.
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
        p5, p95 = np.percentile(self.seconds, [5, 95])
        return {
            **asdict(self),
            "seconds": list(self.seconds),
            "median": self.median,
            "p5": float(p5),
            "p95": float(p95),
            "images_per_second": self.images_per_second,
        }


def measure(pipeline: Pipeline, plan: SamplingPlan, batch_size: int, repeat: int) -> Measurement:
    """Warm-up, then ``repeat`` generations of one batch.

    Raises:
        UsageError: ``repeat`` or ``batch_size`` is below 1.
    """
    if repeat < 1 or batch_size < 1:
        raise UsageError(f"repeat {repeat} and batch size {batch_size} must be at least 1")
    labels = [index % pipeline.architecture.classes for index in range(batch_size)]
    inner = pipeline.backend
    backend = TimedDeviceBackend(inner) if isinstance(inner, DeviceBackend) else TimedBackend(inner)
    timed = Pipeline(pipeline.architecture, backend, pipeline.plan_defaults, pipeline.max_batch)
    timed.warm_up(plan, batch_size)
    timed.generate(labels, plan=plan, batch_size=batch_size)
    backend.seconds = dict.fromkeys(backend.seconds, 0.0)
    seconds: list[float] = []
    for index in range(repeat):
        seeds = range(index * batch_size, (index + 1) * batch_size)
        start = time.perf_counter()
        timed.generate(labels, seeds=list(seeds), plan=plan, batch_size=batch_size)
        seconds.append(time.perf_counter() - start)
    total = sum(seconds)
    shares = {part: spent / total for part, spent in backend.seconds.items()}
    shares["host"] = 1.0 - sum(shares.values())
    return Measurement(plan.settings.name, batch_size, tuple(seconds), shares, peak_memory(), plan.flops * batch_size)


def peak_memory() -> int:
    """Highest resident memory of this process, bytes."""
    try:
        # On Linux getrusage also counts what the process that started this one had at that moment.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
