"""A plan's time from a few calls: exact where calls cost what the model of their cost says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from compare_calls import SHORT, Job, PlanCalls, time_jobs
from compare_memory import largest_jobs

from gtr_deploy.runtime import BackendError
from gtr_deploy.runtime.models.architecture import ARCHITECTURES
from gtr_deploy.runtime.models.mar import backbone_flops
from gtr_deploy.runtime.sampling.chains import chain_shape
from gtr_deploy.runtime.sampling.plan import PRESETS, ARStep, preset, resolve

MAR_B = ARCHITECTURES["mar-b"]
PER_CHAIN, PER_ROW = 0.01, 0.001


def head_seconds(step: ARStep, batch: int) -> float:
    shape = chain_shape(step)
    return PER_CHAIN + PER_ROW * batch * (shape.longer * shape.alone + step.predicted * shape.common)


def job_seconds(job: Job) -> float:
    step = job.step
    if job.kind == "backbone":
        return 1e-12 * backbone_flops(MAR_B, step.known, step.predicted, step.context, step.branches)
    return 0.5 if job.kind == "detail" else head_seconds(step, job.batch)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("batch", "samples"), [(1, 0), (1, 4), (8, 3)])
def test_estimates_are_exact_where_costs_are_linear(name: str, batch: int, samples: int) -> None:
    plan = resolve(preset(name, MAR_B, {"cfg": 2.9}), MAR_B)
    calls = PlanCalls(plan, batch, MAR_B, samples)
    found = calls.estimate({job: job_seconds(job) for job in calls.jobs}, host=0.25)
    scored = sum(1 for step in plan.steps if step.refined)
    expected = sum(1e-12 * step.backbone_flops for step in plan.steps) + 0.5 * scored
    # The jobs' own FLOPs are without guidance's rounding: equal to the last digits only.
    assert found.seconds["backbone"] == pytest.approx(expected)
    assert found.seconds["head"] == pytest.approx(sum(head_seconds(step, batch) for step in plan.steps))
    assert found.total == pytest.approx(sum(found.seconds.values()))
    assert found.seconds["host"] == 0.25
    assert len(found.calls) == len(plan.steps)
    if samples:
        assert len(calls.backbone) <= samples
        assert f"{len(calls.backbone)} of {len(plan.steps)}" in found.note


def test_alike_calls_are_timed_once() -> None:
    plan = resolve(preset("gtr", MAR_B, {"cfg": 2.9}), MAR_B)
    chains = {job for job in PlanCalls(plan, 1, MAR_B, 3).jobs if job.kind == "chain"}
    assert len(chains) <= 2 * len({(step.predicted, step.refined) for step in plan.steps})


@pytest.mark.parametrize("fts", ["all", "none", "random"])
@pytest.mark.parametrize(("plain", "refined"), [(20, 50), (50, 20), (21, 50), (20, 20), (1, 1)])
def test_odd_chains(fts: str, plain: int, refined: int) -> None:
    settings = preset("gtr-fast", MAR_B, {"cfg": 2.9})
    settings = replace(settings, fts=fts, reconstruction_diffusion=plain, fts_diffusion=refined)
    plan = resolve(settings, MAR_B)
    calls = PlanCalls(plan, 1, MAR_B, 2)
    found = calls.estimate({job: job_seconds(job) for job in calls.jobs}, host=0.0)
    assert found.seconds["head"] == pytest.approx(sum(head_seconds(step, 1) for step in plan.steps))


def test_contenders_take_turns() -> None:
    plan = resolve(preset("gtr-fast", MAR_B), MAR_B)
    jobs = PlanCalls(plan, 1, MAR_B, 2).jobs[:2]
    order: list[str] = []

    def contender(name: str):
        return lambda job: lambda: order.append(name)

    work = [(job, [("a", contender("a")), ("b", contender("b"))]) for job in jobs]
    times = time_jobs(work, rounds=2)
    assert set(times) == {"a", "b"}
    assert set(times["a"]) == set(jobs)
    assert [name for name, _ in itertools.groupby(order)] == ["a", "b"] * 4


def test_a_contender_that_fails_has_no_more_turns() -> None:
    plan = resolve(preset("gtr-fast", MAR_B), MAR_B)
    jobs = PlanCalls(plan, 1, MAR_B, 2).jobs[:2]
    turns: list[Job] = []

    def broken(job: Job):
        turns.append(job)
        raise BackendError("out of\nmemory")

    failed: dict[str, str] = {}
    work = [(job, [("a", broken), ("b", lambda job: lambda: None)]) for job in jobs]
    times = time_jobs(work, rounds=2, failed=failed)
    assert failed == {"a": "out of memory"}
    assert turns == jobs[:1]
    assert set(times) == {"b"}
    with pytest.raises(BackendError):
        time_jobs(work, rounds=1)


def test_largest_calls_are_short() -> None:
    plan = resolve(preset("gtr", MAR_B), MAR_B)
    backbone, chain = largest_jobs(plan, 8, MAR_B)
    assert backbone.step.known == max(step.known for step in plan.steps)
    assert chain.step.predicted == max(step.predicted for step in plan.steps)
    assert chain.step.diffusion_steps <= SHORT
