"""Who is compared: a bundle on a backend of this project. The original project's code is in original.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from gtr_deploy.runtime import Bundle, Pipeline, SamplingPlan
from gtr_deploy.runtime.sampling.plan import preset, resolve


@dataclass(frozen=True)
class Seconds:
    """Of one generation, for the whole batch.

    Attributes:
        wall: by the clock.
        cpu: of the processor, all threads of this process together.
    """

    wall: float
    cpu: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


@contextmanager
def stopwatch() -> Iterator[list[Seconds]]:
    """The list that it gives holds the seconds of the block once that is over."""
    found: list[Seconds] = []
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found.append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))


class Contender(Protocol):
    """One way to run a model.

    Attributes:
        backend: its name.
        bundle: whose weights it runs.
    """

    backend: str
    bundle: Bundle

    def refusal(self, plan: SamplingPlan) -> str | None:
        """Why it cannot run a plan; None if it can."""
        ...

    def generate(self, plan: SamplingPlan, batch: int, seed: int) -> Seconds:
        """Runs a whole generation; its time without the decoder, which no plan changes."""
        ...

    def close(self) -> None:
        """Gives memory back."""
        ...


class PipelineContender:
    """A backend of this project."""

    def __init__(self, backend: str, bundle: Bundle, threads: int) -> None:
        """Raises:
        GtrError: there is no such backend, or it cannot run here, or not this bundle.
        """
        self.backend, self.bundle = backend, bundle
        self.pipeline = Pipeline.load(bundle, backend=backend, threads=threads)

    def refusal(self, plan: SamplingPlan) -> str | None:
        return None

    def generate(self, plan: SamplingPlan, batch: int, seed: int) -> Seconds:
        requests = self.bundle.conditioner.samples(batch)
        seeds = list(range(seed, seed + batch))
        self.pipeline.warm_up(plan, batch)
        with stopwatch() as whole:
            made = self.pipeline.generate(requests, seeds=seeds, plan=plan, batch_size=batch)
        with stopwatch() as decoder:
            self.pipeline.backend.decode(made.latents)
        return whole[0] - decoder[0]

    def close(self) -> None:
        self.pipeline.close()


def short_plan(bundle: Bundle) -> SamplingPlan:
    """Four AR steps of five diffusion steps: enough for a library's first calls, whose time is not measured."""
    settings = preset("mar", bundle.architecture, bundle.plan_defaults)
    return resolve(replace(settings, stage_steps=(4,), generation_diffusion=(5, 5)), bundle.architecture)
