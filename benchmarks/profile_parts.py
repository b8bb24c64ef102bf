"""Seconds of one generation, part by part and AR step by AR step. Watches from outside: no backend knows of it.

Parts are ``backbone``, ``detail`` and ``head`` (inside the engine library), ``backend host`` (what the backend does
around its engine calls), and the sampler's own work on the host: ``orders``, ``noise``, ``tables`` (chains of reverse
steps without their noise), ``selection`` and ``gather`` (everything else: tokens in and out of their places, checks).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from gtr_deploy.runtime import Pipeline, SamplingPlan, UsageError
from gtr_deploy.runtime.backends.protocol import Backend, DeviceBackend, StepResult
from gtr_deploy.runtime.sampling import loop as sampler
from gtr_deploy.runtime.sampling.noise import SeededNoise

ENGINE: tuple[str, ...] = ("backbone", "detail", "head")
HOST: tuple[str, ...] = ("backend host", "orders", "noise", "tables", "selection", "gather")
PARTS: tuple[str, ...] = (*ENGINE, *HOST)

_PART_OF_GRAPH = {"backbone": "backbone", "detail_score": "detail", "diffusion_step": "head"}
_PART_OF_CALL = {"condition": "backbone", "detail": "detail", "denoise": "head"}


@dataclass
class Clock:
    """Adds up seconds per part; a part that runs inside another is taken off the outer one.

    Attributes:
        seconds: part to seconds since the last :meth:`take`.
        calls: part to number of calls, likewise.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    _inside: list[float] = field(default_factory=list)

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, timed as ``part``."""

        def timed(*arguments: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                spent = time.perf_counter() - start
                inner = self._inside.pop()
                self.seconds[part] += spent - inner
                self.calls[part] += 1
                if self._inside:
                    self._inside[-1] += spent

        return timed

    def take(self) -> dict[str, float]:
        """The seconds so far; starts again from 0."""
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return taken


class WatchedBackend:
    """A backend whose calls are timed; time inside its engine library goes to the engine's part."""

    def __init__(self, inner: Backend, clock: Clock, sessions: bool) -> None:
        """Args:
        sessions: whether engine calls are timed by themselves (:func:`watched_sessions`); else every second of
            a call counts as the engine's.
        """
        self.name = inner.name
        for call, part in _PART_OF_CALL.items():
            setattr(self, call, clock.wrap("backend host" if sessions else part, getattr(inner, call)))


@contextmanager
def watched_sessions(clock: Clock) -> Iterator[None]:
    """ONNX Runtime sessions that are opened inside the block are timed as the part that their file's name says."""
    import onnxruntime

    real = onnxruntime.InferenceSession

    def opened(path: str, *arguments: Any, **options: Any) -> Any:
        session = real(path, *arguments, **options)
        part = part_of_graph(str(path))
        if part is not None:
            session.run = clock.wrap(part, session.run)
            session.run_with_iobinding = clock.wrap(part, session.run_with_iobinding)
            for name in ("run_with_ort_values", "run_with_ortvaluevector"):
                if hasattr(session, name):
                    setattr(session, name, clock.wrap(part, getattr(session, name)))
        return session

    with patch.object(onnxruntime, "InferenceSession", opened):
        yield


def part_of_graph(path: str) -> str | None:
    """``backbone``, ``detail`` or ``head`` by the name of a graph's file; None for graphs outside the sampler."""
    name = path.rsplit("/", 1)[-1]
    return next((part for kind, part in _PART_OF_GRAPH.items() if kind in name), None)


class _TimedNoise:
    """A noise source whose draws are timed; ``clock.wrap`` on the class's own method would time other generations."""

    def __init__(self, inner: SeededNoise, clock: Clock) -> None:
        self.draw: Callable[..., NDArray[np.float32]] = clock.wrap("noise", inner.draw)


@dataclass(frozen=True)
class Profile:
    """One generation.

    Attributes:
        seconds: all of it, without the VAE decoder.
        parts: part to seconds; they add up to ``seconds``.
        steps: the same for each AR step; what comes before the first one (orders) counts to it.
        calls: part to number of calls.
    """

    seconds: float
    parts: dict[str, float]
    steps: tuple[dict[str, float], ...]
    calls: dict[str, int]

    @property
    def host_share(self) -> float:
        """Share of everything outside engine calls."""
        return sum(self.parts[part] for part in HOST) / self.seconds


def thinned(plan: SamplingPlan, ar_steps: int | None) -> SamplingPlan:
    """The plan with ``ar_steps`` of its AR steps, evenly spaced, the first and the last among them.

    What is generated is no image, but each step left costs what it costs in the whole plan.
    """
    if ar_steps is None or ar_steps >= len(plan.steps):
        return plan
    if ar_steps < 1:
        raise UsageError(f"{ar_steps} AR steps: give at least 1")
    indices = np.unique(np.linspace(0, len(plan.steps) - 1, ar_steps).round().astype(int))
    return SamplingPlan(plan.settings, tuple(plan.steps[index] for index in indices))


def profile_parts(
    pipeline: Pipeline, clock: Clock, plan: SamplingPlan, batch: int, sessions: bool, seed: int = 0
) -> Profile:
    """Runs one generation of ``batch`` images and says where its seconds went.

    Args:
        pipeline: opened inside :func:`watched_sessions` of the same clock where ``sessions`` is set.
        plan: may be :func:`thinned`.

    Raises:
        UsageError: the backend runs whole generations by itself; gtr-run bench tells their parts.
    """
    backend, architecture = pipeline.backend, pipeline.architecture
    if isinstance(backend, DeviceBackend):
        raise UsageError(f"{backend.name} runs whole generations on its device; gtr-run bench tells their parts")
    watched: Any = WatchedBackend(backend, clock, sessions)
    labels = [index % architecture.classes for index in range(batch)]
    seeds = list(range(seed, seed + batch))
    noise: Any = _TimedNoise(SeededNoise(seeds, architecture.token_channels), clock)
    steps: list[dict[str, float]] = []
    ends: list[float] = []

    def after_step(_: StepResult) -> None:
        ends.append(time.perf_counter())
        steps.append(clock.take())

    with (
        patch.object(sampler, "generation_orders", clock.wrap("orders", sampler.generation_orders)),
        patch.object(sampler, "diffusion_chain", clock.wrap("tables", sampler.diffusion_chain)),
        patch.object(sampler, "select", clock.wrap("selection", sampler.select)),
    ):
        clock.take()
        clock.calls = dict.fromkeys(PARTS, 0)
        start = time.perf_counter()
        sampler.sample(watched, plan, architecture, labels, seeds, noise, observer=after_step)
    for step, begin, end in zip(steps, [start, *ends], ends, strict=False):
        step["gather"] += (end - begin) - sum(step.values())
    parts = {part: sum(step[part] for step in steps) for part in PARTS}
    return Profile(ends[-1] - start, parts, tuple(steps), dict(clock.calls))
