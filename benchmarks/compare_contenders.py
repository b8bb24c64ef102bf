"""Who is compared: a backend of this project with a bundle. The original project's code is in compare_original.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from compare_calls import Job, Prepared

from gtr_deploy.runtime import Bundle, Pipeline, SamplingPlan, UsageError
from gtr_deploy.runtime.backends.protocol import Condition, DeviceBackend, DiffusionChain
from gtr_deploy.runtime.backends.registry import BACKENDS
from gtr_deploy.runtime.commands.timing import TimedBackend, TimedDeviceBackend
from gtr_deploy.runtime.sampling.loop import diffusion_chain, sample
from gtr_deploy.runtime.sampling.noise import SeededNoise

ORIGINAL = "original"
REFERENCES = (ORIGINAL, "torch")
"""What ratios are against: the original project's code, or where it is not at hand the torch backend."""

Parts = dict[str, float]
"""Seconds of ``backbone``, ``head`` and ``host``."""


class Contender(Protocol):
    """One way to run a model.

    Attributes:
        backend: its name.
        precision: of its networks.
        bundle: whose weights it runs.
    """

    backend: str
    precision: str
    bundle: Bundle

    def refusal(self, plan: SamplingPlan, calls: bool) -> str | None:
        """Why it cannot run a plan (call by call, if ``calls``); None if it can."""
        ...

    def prepare(self, job: Job) -> Prepared:
        """Everything for a call but the call."""
        ...

    def host(self, plan: SamplingPlan, batch: int) -> float:
        """Seconds of one generation outside engine calls, which are left out."""
        ...

    def generate(self, plan: SamplingPlan, batch: int, seed: int) -> Parts:
        """Runs a whole generation; its seconds per part, without the VAE decoder."""
        ...

    def close(self) -> None:
        """Gives memory back."""
        ...


def open_contender(backend: str, bundle: Bundle, threads: int, provider: str = "auto") -> Contender:
    """A backend of this project.

    Raises:
        UsageError: there is no such backend.
        GtrError: it cannot run here, or not this bundle; the line says why.
    """
    if backend not in BACKENDS:
        names = ", ".join((*BACKENDS, ORIGINAL))
        raise UsageError(f"backend {backend!r} is not one of {names}")
    if backend == "torch" and bundle.precision not in ("fp32", "fp16", "bf16"):
        raise UsageError(f"torch has no {bundle.precision} networks")
    takes_provider = backend in ("onnxruntime", "torch")
    options: dict[str, Any] = {"threads": threads, "provider": provider if takes_provider else "auto"}
    return PipelineContender(Pipeline.load(bundle, backend, **options), backend, bundle)


class PipelineContender:
    """A backend behind the runtime's interface."""

    def __init__(self, pipeline: Pipeline, backend: str, bundle: Bundle) -> None:
        self.backend, self.precision, self.bundle = backend, bundle.precision, bundle
        self._pipeline, self._architecture = pipeline, pipeline.architecture

    def refusal(self, plan: SamplingPlan, calls: bool) -> str | None:
        if calls and isinstance(self._pipeline.backend, DeviceBackend):
            return "it runs whole generations on its device; use --mode whole"
        return None

    def prepare(self, job: Job) -> Prepared:
        backend: Any = self._pipeline.backend
        arguments = self._backbone_inputs(job)
        if job.kind == "backbone":
            return lambda: backend.condition(*arguments)
        condition = backend.condition(*arguments)
        if job.kind == "detail":
            return lambda: backend.detail(condition)
        chain = self._chain(job)
        return lambda: backend.denoise(condition, chain)

    def _backbone_inputs(self, job: Job) -> tuple[np.ndarray, ...]:
        """Arguments of ``condition``: random tokens at positions that partition the grid."""
        architecture, step = self._architecture, job.step
        rng = np.random.default_rng(0)
        order = np.stack([rng.permutation(architecture.tokens) for _ in range(job.batch)]).astype(np.int64)
        ends = np.cumsum([step.known, step.predicted, step.context])
        visible, predict, context, _ = np.split(order, ends, axis=1)
        tokens = rng.standard_normal((job.batch, step.known, architecture.token_channels), dtype=np.float32)
        labels = np.stack(
            [rng.integers(0, architecture.classes, job.batch), np.full(job.batch, architecture.null_label)]
        ).astype(np.int64)
        positions = (np.ascontiguousarray(part) for part in (visible, predict, context))
        return tokens, *positions, labels[: step.branches]

    def _chain(self, job: Job) -> DiffusionChain:
        step = job.step
        # DiSA's cap keeps the numbers of untrained weights in range; it makes no difference to time.
        settings = replace(self._pipeline.plan("mar").settings, max_timestep=950)
        predict = np.tile(np.arange(step.predicted, dtype=np.int64), (job.batch, 1))
        refined = np.zeros(predict.shape, dtype=bool)
        refined[:, : step.refined] = True
        noise = SeededNoise(range(job.batch), self._architecture.token_channels)
        return diffusion_chain(step, settings, predict, refined, noise)

    def host(self, plan: SamplingPlan, batch: int) -> float:
        idle: Any = IdleBackend(self._architecture.width)
        spent = []
        for seed in (0, 1000, 2000):
            start = time.perf_counter()
            self._sample(idle, plan, batch, seed)
            spent.append(time.perf_counter() - start)
        return sorted(spent)[1]

    def generate(self, plan: SamplingPlan, batch: int, seed: int) -> Parts:
        inner = self._pipeline.backend
        timed: Any = TimedBackend(inner)
        if isinstance(inner, DeviceBackend):
            timed = TimedDeviceBackend(inner)
            timed.warm_up(plan, batch)
        start = time.perf_counter()
        self._sample(timed, plan, batch, seed)
        total = time.perf_counter() - start
        engine = {part: timed.seconds[part] for part in ("backbone", "head")}
        return {**engine, "host": total - sum(engine.values())}

    def _sample(self, backend: Any, plan: SamplingPlan, batch: int, seed: int) -> None:
        architecture = self._architecture
        labels = [index % architecture.classes for index in range(batch)]
        seeds = list(range(seed, seed + batch))
        noise = SeededNoise(seeds, architecture.token_channels)
        sample(backend, plan, architecture, labels, seeds, noise)

    def close(self) -> None:
        self._pipeline.close()


class IdleBackend:
    """Does none of the work, so that what is left of a generation is the host's."""

    name = "idle"

    def __init__(self, width: int) -> None:
        self._width = width

    def condition(self, tokens: Any, visible: Any, predict: np.ndarray, context: Any, labels: np.ndarray) -> Condition:
        """Only the shape of z."""
        return Condition((len(labels), *predict.shape, self._width), None)

    def detail(self, condition: Condition) -> tuple[np.ndarray, np.ndarray]:
        """Any scores."""
        score = np.arange(condition.shape[1] * condition.shape[2], dtype=np.float32).reshape(condition.shape[1:3])
        return score, score

    def denoise(self, condition: Condition, chain: DiffusionChain) -> np.ndarray:
        """x_T as it came."""
        return chain.x

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Never called: the VAE decoder is left out on all sides."""
        raise NotImplementedError


Opener = Callable[[], Contender]
