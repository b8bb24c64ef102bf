"""Measures points: opens the contenders, times them in turn, writes a line for each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_calls import CALL_COLUMNS, Job, PlanCalls, time_jobs
from compare_contenders import ORIGINAL, REFERENCES, Contender, open_contender
from compare_memory import peak_of
from compare_plans import named_settings
from compare_records import (
    Environment,
    Record,
    append_record,
    bundle_digest,
    load_average,
    now,
    point_key,
    read_records,
)
from roofline import Rates

from gtr_deploy.runtime import Bundle, GtrError, SamplingPlan, UsageError
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.sampling.plan import resolve

BACKENDS_OF = {
    "fp32": (ORIGINAL, "torch", "onnxruntime", "openvino"),
    "fp16": ("torch", "onnxruntime", "tensorrt"),
    "bf16": ("openvino",),
    "int8": ("onnxruntime", "openvino"),
}
"""Who runs a precision if nobody is named."""

WHOLE_FLOPS = 2e11
"""``--mode auto`` times whole generations up to here."""


@dataclass(frozen=True)
class Settings:
    """What one run measures; see the command's help. ``memory`` names plans."""

    plans: Sequence[str]
    batches: Sequence[int]
    backends: Sequence[str] | None
    reference_plans: Sequence[str]
    threads: int
    mode: str
    rounds: int
    samples: int
    memory: Sequence[str]
    provider: str
    original: Path | None
    force: bool


@dataclass
class Point:
    """One plan and one contender at one batch size, to be measured; ``parts`` and ``cpu`` per whole generation."""

    plan: SamplingPlan
    mode: str
    backend: str
    bundle: Bundle
    key: str
    contender: Contender | None = None
    parts: list[dict[str, float]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the contender: backend and precision."""
        return f"{self.backend} {self.bundle.precision}"


@dataclass
class Comparison:
    """One run: where it happens, what it writes to."""

    settings: Settings
    environment: Environment
    rates: Rates
    results: Path
    reporter: Reporter
    started: str

    def run(self, bundles: Sequence[Bundle]) -> int:
        """Measures what is missing; returns the number of new lines."""
        done = set() if self.settings.force else {r["key"] for r in read_records(self.results) if "seconds" in r}
        written = 0
        for model in dict.fromkeys(bundle.architecture.name for bundle in bundles):
            own = [bundle for bundle in bundles if bundle.architecture.name == model]
            opened: dict[str, Contender | str] = {}
            try:
                for batch in self.settings.batches:
                    points = [point for point in self.points(own, batch) if point.key not in done]
                    written += self._measure(points, model, batch, opened)
            finally:
                for contender in opened.values():
                    if not isinstance(contender, str):
                        contender.close()
        return written

    def points(self, bundles: Sequence[Bundle], batch: int) -> Iterator[Point]:
        """All points of one model and batch size."""
        s = self.settings
        for plan_name in s.plans:
            for bundle in bundles:
                architecture = bundle.architecture
                plan = resolve(named_settings(plan_name, architecture, bundle.plan_defaults), architecture)
                mode = s.mode
                if mode == "auto":
                    mode = "whole" if plan.flops * batch <= WHOLE_FLOPS else "calls"
                for backend in BACKENDS_OF.get(bundle.precision, ("onnxruntime",)):
                    if s.backends is not None and backend not in s.backends:
                        continue
                    if backend == ORIGINAL and s.original is None:
                        continue
                    if backend in REFERENCES and plan_name not in s.reference_plans:
                        continue
                    samples = s.samples if mode == "calls" else None
                    settings = [
                        bundle_digest(bundle),
                        backend,
                        plan.settings.to_json(),
                        batch,
                        s.threads,
                        mode,
                        samples,
                    ]
                    yield Point(plan, mode, backend, bundle, point_key(self.environment, point=settings))

    def _measure(self, points: list[Point], model: str, batch: int, opened: dict[str, Contender | str]) -> int:
        """Opens the contenders, times them in turn, writes their lines."""
        if not points:
            self.reporter.say(f"{model}, batch {batch}: nothing new to measure")
            return 0
        ready: list[Point] = []
        for point in points:
            found = opened.get(point.name)
            if found is None:
                found = opened[point.name] = self._open(point)
            reason = found if isinstance(found, str) else found.refusal(point.plan, point.mode == "calls")
            if isinstance(found, str) or reason is not None:
                self._refused(point, batch, str(reason))
                continue
            point.contender = found
            ready.append(point)
        load = load_average()
        for mode, measure in (("whole", self._whole), ("calls", self._calls)):
            chosen = [point for point in ready if point.mode == mode]
            if chosen:
                measure(chosen, model, batch, load)
        return len(points)

    def _open(self, point: Point) -> Contender | str:
        """The contender, or why it cannot run."""
        s = self.settings
        try:
            with self.reporter.stage(f"open {point.bundle.architecture.name} {point.name}"):
                if point.backend == ORIGINAL:
                    from compare_original import OriginalContender

                    assert s.original is not None
                    return OriginalContender(s.original, point.bundle, s.threads)
                return open_contender(point.backend, point.bundle, s.threads, s.provider)
        except UsageError:
            raise
        except GtrError as error:
            return " ".join(str(error).split())
        except (RuntimeError, OSError, AttributeError) as error:
            # What a library that does not fit this machine throws while it is loaded.
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _whole(self, points: list[Point], model: str, batch: int, load: list[float]) -> None:
        with self.reporter.bar(f"{model}, batch {batch}", len(points) * self.settings.rounds, "generations") as bar:
            for seed in range(self.settings.rounds):
                for point in points:
                    assert point.contender is not None
                    if seed == 0 and point.plan.flops * batch <= WHOLE_FLOPS:
                        point.contender.generate(point.plan, batch, seed)
                    busy = time.process_time()
                    point.parts.append(point.contender.generate(point.plan, batch, seed * batch))
                    point.cpu.append(time.process_time() - busy)
                    bar.advance()
        for point in points:
            totals = sorted(sum(parts.values()) for parts in point.parts)
            middle = sorted(point.parts, key=lambda parts: sum(parts.values()))[(len(totals) - 1) // 2]
            note = f"median of {len(totals)} whole generations"
            self._write(
                point,
                batch,
                load,
                middle,
                {"repetitions": totals, "cpu_seconds": statistics.median(point.cpu), "note": note},
            )

    def _calls(self, points: list[Point], model: str, batch: int, load: list[float]) -> None:
        s = self.settings
        calls = {id(p): PlanCalls(p.plan, batch, p.bundle.architecture, s.samples) for p in points}
        wanted: dict[Job, dict[str, Callable[[Job], Any]]] = {}
        for point in points:
            assert point.contender is not None
            for job in calls[id(point)].jobs:
                wanted.setdefault(job, {})[point.name] = point.contender.prepare
        work = [(job, list(contenders.items())) for job, contenders in wanted.items()]
        turns = s.rounds * sum(len(contenders) for _, contenders in work)
        with self.reporter.bar(f"{model}, batch {batch}", turns, "turns") as bar:
            failed: dict[str, str] = {}
            times = time_jobs(work, s.rounds, bar.advance, failed)
        for point in points:
            assert point.contender is not None
            if point.name in failed:
                self._refused(point, batch, failed[point.name])
                continue
            host = point.contender.host(point.plan, batch)
            wall, busy = (
                calls[id(point)].estimate({job: pair[column] for job, pair in times[point.name].items()}, host)
                for column in (0, 1)
            )
            extra = {
                "columns": CALL_COLUMNS,
                "calls": wall.calls,
                "note": wall.note,
                "cpu_seconds": busy.total,
                "rounds": s.rounds,
            }
            self._write(point, batch, load, wall.seconds, extra)

    def _refused(self, point: Point, batch: int, reason: str) -> None:
        """A line for what cannot run; it is tried again next time."""
        append_record(self.results, {**self._head(point, batch), "not_run": reason})
        name = f"{point.bundle.architecture.name} {point.plan.settings.name} {point.name}"
        self.reporter.say(f"{name}: not run: {reason}")

    def _head(self, point: Point, batch: int) -> Record:
        """What every line has."""
        return {
            "key": point.key,
            "model": point.bundle.architecture.name,
            "plan": point.plan.settings.name,
            "batch": batch,
            "backend": point.backend,
            "precision": point.bundle.precision,
            "threads": self.settings.threads,
            "mode": point.mode,
            "run": self.started,
            "date": now(),
            "environment": self.environment.to_json(),
            "rates": self.rates.to_json(),
            "bundle": bundle_digest(point.bundle),
            "ar_steps": len(point.plan.steps),
            "head_calls": point.plan.head_calls,
            "flops": point.plan.flops * batch,
        }

    def _write(self, point: Point, batch: int, load: list[float], parts: dict[str, float], extra: Record) -> None:
        s, folder = self.settings, point.bundle.folder
        peak = None
        if point.plan.settings.name in s.memory and point.backend not in REFERENCES:
            peak = peak_of(folder, point.backend, point.plan.settings.name, batch, s.threads)
        record = {
            **self._head(point, batch),
            "seconds": sum(parts.values()),
            "parts": parts,
            "work": [
                [step.backbone_flops * batch, step.head_flops * batch, step.head_calls] for step in point.plan.steps
            ],
            "weight_bytes": {
                part: weight_bytes(point.bundle, kind)
                for part, kind in (("backbone", "backbone"), ("head", "diffusion_step"))
            },
            "peak_bytes": peak,
            "load_before": load,
            "load_after": load_average(),
            **extra,
        }
        append_record(self.results, record)
        each = record["seconds"] / batch
        self.reporter.say(f"{record['model']} {record['plan']} batch {batch} {point.name}: {each:.3f} s per image")


def weight_bytes(bundle: Bundle, kind: str) -> int:
    """Of the graph that a CPU runs; the checkpoint's weights are as large as those of the fp32 graph."""
    files = bundle.graphs[kind]
    return (files.cpu or files).bytes
