"""A plan taken apart into calls, and its time put together again from a few of them.

A whole generation of a large model takes minutes on a CPU, nearly all of it in a few dozen shapes of call. So time each
shape a few times, in turn between the contenders, and add up. Backbone calls of plans with many shapes are measured at
some AR steps and interpolated in FLOPs between them. A chain of reverse steps takes a fixed time and a time per step,
found from two short chains; so it does not matter whether a backend does part of the work once per chain.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gtr_deploy.runtime import GtrError, SamplingPlan
from gtr_deploy.runtime.models.flops import head_flops
from gtr_deploy.runtime.sampling.plan import ARStep
from gtr_deploy.runtime.sampling.selection import SCORED_RULES
from gtr_deploy.runtime.sampling.shapes import chain_shape

SHORT, LONG = 4, 16
"""Reverse steps of the two chains that are timed."""

HEAVY_CHAIN = 1e11
"""FLOPs that a timed chain should not pass; the chains of many rows are shorter."""

SETTLE = 0.02
"""Seconds between two contenders' turns, so that the threads of the last one stop spinning."""

CHEAP = 0.3
"""Seconds that repetitions of a short call may take together in one round."""


@dataclass(frozen=True)
class Job:
    """One thing that a contender does and is timed at.

    Attributes:
        kind: ``backbone``, ``detail`` or ``chain``.
        batch: B.
        step: sizes (known, predicted, context, branches), and for a chain its step counts, which are shorter than the
            plan's. Guidance, stage and index do not matter for time; those of jobs that are alike are made equal.
    """

    kind: str
    batch: int
    step: ARStep

    @property
    def text(self) -> str:
        """For people."""
        s = self.step
        if self.kind == "backbone":
            return f"backbone B={self.batch} V={s.known} P={s.predicted} R={s.context}"
        if self.kind == "detail":
            return f"detail B={self.batch} P={s.predicted}"
        refined = f" and {s.refined_diffusion_steps} for {s.refined}" if s.refined else ""
        return f"chain B={self.batch} P={s.predicted}, {s.diffusion_steps} steps{refined}"


@dataclass(frozen=True)
class Chain:
    """The chain of an AR step, to be computed from short ones.

    Attributes:
        units: the chain is ``units`` times a smallest chain of the same proportions.
        jobs: (units, job) of the chains to time: two, or one where the chain itself is short.
    """

    units: int
    jobs: tuple[tuple[int, Job], ...]

    def seconds(self, measured: Mapping[Job, float]) -> float:
        """The longer timed chain, and the slope between the two for all units beyond it."""
        if len(self.jobs) == 1:
            units, job = self.jobs[0]
            return measured[job] * self.units / units
        (few, short), (many, long) = self.jobs
        slope = max(0.0, (measured[long] - measured[short]) / (many - few))
        return measured[long] + slope * (self.units - many)


CALL_COLUMNS = ("known", "predicted", "context", "backbone_seconds", "backbone_measured", "head_seconds")
"""Of one AR step: tokens, seconds of its backbone call, whether that was measured or interpolated, of its chain."""


@dataclass(frozen=True)
class Estimate:
    """One generation put together from calls.

    Attributes:
        seconds: part (``backbone``, ``head``, ``host``) to seconds; detail scores count as backbone.
        calls: per AR step the values of :data:`CALL_COLUMNS`.
        note: how much of the backbone was measured.
    """

    seconds: dict[str, float]
    calls: list[list[Any]]
    note: str

    @property
    def total(self) -> float:
        """Seconds of the whole generation."""
        return sum(self.seconds.values())


class PlanCalls:
    """The calls of one plan at one batch size."""

    def __init__(self, plan: SamplingPlan, batch: int, architecture: Any, samples: int) -> None:
        """Args:
        samples: AR steps whose backbone call is measured; 0 for all of them.
        """
        self.plan, self.batch = plan, batch
        self._token_flops = {g: head_flops(architecture, g) for g in (1, 2)}
        indices = np.arange(len(plan.steps))
        if 0 < samples < len(indices):
            # Evenly spaced in FLOPs, first and last among them: interpolation needs no guess at the ends.
            work = np.array([step.backbone_flops for step in plan.steps], dtype=np.float64)
            wanted = np.linspace(work.min(), work.max(), samples)
            indices = np.unique([int(np.abs(work - value).argmin()) for value in wanted])
        self.backbone = {int(index): _backbone_job(plan.steps[index], batch) for index in indices}
        settings = plan.settings
        self.detail: dict[int, Job] = {
            step.index: Job("detail", batch, _plain(step, known=0, context=0))
            for step in plan.steps
            if settings.fts in SCORED_RULES and 0 < step.refined < step.predicted
        }
        self.chains = [_chain(step, batch, self._token_flops[step.branches]) for step in plan.steps]

    @property
    def jobs(self) -> list[Job]:
        """What has to be timed, each once."""
        jobs: list[Job] = [*self.backbone.values(), *self.detail.values()]
        jobs += [job for chain in self.chains for _, job in chain.jobs]
        return list(dict.fromkeys(jobs))

    def estimate(self, measured: Mapping[Job, float], host: float) -> Estimate:
        """Adds up.

        Args:
            measured: seconds of every job.
            host: seconds of one generation outside engine calls.
        """
        steps = self.plan.steps
        known = sorted(
            (steps[index].backbone_flops, measured[job], steps[index].known) for index, job in self.backbone.items()
        )
        work, spent = [entry[0] for entry in known], [entry[1] for entry in known]
        calls: list[list[Any]] = []
        seconds = {"backbone": 0.0, "head": 0.0, "host": host}
        for index, step in enumerate(steps):
            one = float(np.interp(step.backbone_flops, work, spent))
            chain = self.chains[index].seconds(measured)
            detail = measured[self.detail[step.index]] if step.index in self.detail else 0.0
            seconds["backbone"] += one + detail
            seconds["head"] += chain
            measured_here = index in self.backbone
            calls.append([step.known, step.predicted, step.context, _rounded(one), measured_here, _rounded(chain)])
        distinct, measured_count = len(steps), len(self.backbone)
        note = "every AR step's backbone measured"
        if measured_count < distinct:
            note = f"backbone measured at {measured_count} of {distinct} AR steps, interpolated in FLOPs between them"
        return Estimate(seconds, calls, note)


def _rounded(seconds: float) -> float:
    """To six digits: more than a clock is worth."""
    return float(f"{seconds:.6g}")


def _plain(step: ARStep, **changes: Any) -> ARStep:
    """The step without what makes no difference to time."""
    common = {"index": 0, "stage": 0, "guidance": 2.0 if step.branches == 2 else 1.0, "backbone_flops": 0}
    return replace(step, **{**common, "head_flops": 0, **changes})


def _backbone_job(step: ARStep, batch: int) -> Job:
    return Job("backbone", batch, _plain(step, diffusion_steps=1, refined=0, refined_diffusion_steps=0))


def _chain(step: ARStep, batch: int, token_flops: int) -> Chain:
    shape = chain_shape(step)
    units = math.gcd(step.diffusion_steps, step.refined_diffusion_steps) if shape.longer else shape.common
    steps_of_unit = (shape.alone + shape.common) // units
    work = batch * token_flops * (shape.longer * shape.alone + step.predicted * shape.common) / units
    most = max(2, min(LONG // steps_of_unit, int(HEAVY_CHAIN / work)))
    few = max(1, min(SHORT // steps_of_unit, most // 4))

    def job(count: int) -> Job:
        if shape.longer:
            plain, refined = (n // units * count for n in (step.diffusion_steps, step.refined_diffusion_steps))
            return Job("chain", batch, _plain(step, known=0, context=0, diffusion_steps=plain,
                                              refined_diffusion_steps=refined))  # fmt: skip
        return Job("chain", batch, _plain(step, known=0, context=0, diffusion_steps=count, refined=0,
                                          refined_diffusion_steps=0))  # fmt: skip

    if units <= most:
        return Chain(units, ((units, job(units)),))
    return Chain(units, ((few, job(few)), (most, job(most))))


Prepared = Callable[[], Any]
"""A job ready to run: everything but the call itself is done."""


def time_jobs(
    work: Sequence[tuple[Job, Sequence[tuple[str, Callable[[Job], Prepared]]]]],
    rounds: int,
    progress: Callable[[], None] = lambda: None,
    failed: dict[str, str] | None = None,
) -> dict[str, dict[Job, tuple[float, float]]]:
    """Times every job for every contender that needs it: in rounds, the contenders in turn within each job.

    A machine that is busy for a while is so for all of them, and whatever drifts over minutes meets all jobs.

    Args:
        work: job, and the (name, preparation) of those who do it.
        rounds: visits to each job; at least 1. Short calls are timed several times a visit.
        progress: called after each turn.
        failed: gets the reason of each contender that raised a GtrError, and has no more turns; None lets it through.

    Returns:
        Contender to job to (median seconds, median seconds of processor time of all threads).
    """
    times: dict[tuple[str, Job], list[tuple[float, float]]] = {}
    ready: dict[tuple[str, Job], Prepared] = {}
    warm: set[tuple[str, str]] = set()
    for _ in range(rounds):
        for job, contenders in work:
            for name, prepare in contenders:
                if failed is not None and name in failed:
                    continue
                try:
                    call = ready.get((name, job))
                    if call is None:
                        call = ready[name, job] = prepare(job)
                        if (name, job.kind) not in warm or job.kind != "backbone":
                            # A first call allocates and picks kernels; a backbone call is so long that only the very
                            # first one shows it.
                            call()
                            warm.add((name, job.kind))
                    time.sleep(SETTLE)
                    times.setdefault((name, job), []).extend(_repeat(call))
                except GtrError as error:
                    if failed is None:
                        raise
                    failed[name] = " ".join(str(error).split())
                progress()
    result: dict[str, dict[Job, tuple[float, float]]] = {}
    for (name, job), pairs in times.items():
        wall, busy = (statistics.median(column) for column in zip(*pairs, strict=True))
        result.setdefault(name, {})[job] = (wall, busy)
    return result


def _repeat(call: Prepared) -> list[tuple[float, float]]:
    """Wall and processor seconds of one call, or of several if they are short."""
    found: list[tuple[float, float]] = []
    while not found or (sum(wall for wall, _ in found) + found[-1][0] < CHEAP and len(found) < 5):
        start, busy = time.perf_counter(), time.process_time()
        call()
        found.append((time.perf_counter() - start, time.process_time() - busy))
    return found
