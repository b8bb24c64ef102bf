"""The sampling loop: AR steps around engine calls. Reads like the paper; knows no engine and no file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..backends.protocol import (
    Backend,
    ChainSegment,
    DeviceBackend,
    DiffusionChain,
    Floats,
    GenerationJob,
    Integers,
    Observer,
    StepResult,
    not_finite,
)
from ..errors import UsageError
from ..models.architecture import Architecture
from .diffusion import COEFFICIENTS, reverse_process
from .noise import NoiseSource
from .orders import generation_orders
from .plan import ARStep, PlanSettings, SamplingPlan
from .selection import SCORED_RULES, select

CACHED_ROWS = 256
"""Tables of chains up to this many rows are kept: there they would cost as much as a small head's own work. At most
some 25 MB."""


def sample(
    backend: Backend | DeviceBackend,
    plan: SamplingPlan,
    architecture: Architecture,
    labels: Sequence[int],
    seeds: Sequence[int],
    noise: NoiseSource,
    orders: Integers | None = None,
    observer: Observer | None = None,
) -> Floats:
    """Generates one batch of latents.

    Args:
        backend: runs the graphs; or the whole loop below by itself, on its device.
        plan: what to do, resolved for ``architecture``.
        architecture: the model.
        labels: B class indices.
        seeds: B image seeds, for token orders and the ``random`` selection rule.
        noise: the noise of every token.
        orders: int64 [B, L], positions in the order they are made; from the seeds by default.
        observer: called after each AR step.

    Returns:
        float32 [B, L, C].

    Raises:
        UsageError: orders are not permutations.
        BackendError: an engine produced a value that is not finite.
    """
    job = generation_job(plan, architecture, labels, seeds, noise, orders)
    if isinstance(backend, DeviceBackend):
        return backend.generate(job, observer)
    settings, orders = plan.settings, job.orders
    batch, total = orders.shape
    latents = np.zeros((batch, total, architecture.token_channels), dtype=np.float32)

    for step in plan.steps:
        seen = orders[:, : step.known + step.predicted + step.context]
        visible, predict, context = np.split(seen, [step.known, step.known + step.predicted], axis=1)
        known = np.take_along_axis(latents, visible[:, :, None], axis=1)
        condition = backend.condition(known, visible, predict, context, job.labels[: step.branches])

        refined = np.zeros(predict.shape, dtype=bool)
        if step.refined:
            scored = settings.fts in SCORED_RULES and step.refined < step.predicted
            score, norm = backend.detail(condition) if scored else (None, None)
            refined = select(settings.fts, step.refined, predict, seeds, total, score, norm)

        chain = diffusion_chain(step, settings, predict, refined, noise)
        tokens = np.empty((batch * step.predicted, architecture.token_channels), dtype=np.float32)
        tokens[chain.rows] = backend.denoise(condition, chain)
        if not np.isfinite(tokens).all():
            raise not_finite(step.index, len(plan.steps), backend.name)
        np.put_along_axis(latents, predict[:, :, None], tokens.reshape(batch, step.predicted, -1), axis=1)
        if observer is not None:
            observer(StepResult(step, predict, refined, latents))
    return latents


def generation_job(
    plan: SamplingPlan,
    architecture: Architecture,
    labels: Sequence[int],
    seeds: Sequence[int],
    noise: NoiseSource,
    orders: Integers | None = None,
) -> GenerationJob:
    """What one batch's generation depends on; arguments as :func:`sample` has them.

    Raises:
        UsageError: orders are not permutations.
    """
    settings = plan.settings
    batch, total = len(labels), architecture.tokens
    if orders is None:
        orders = generation_orders(settings.order, architecture.grid, len(settings.stage_steps), settings.parity, seeds)
    if orders.shape != (batch, total) or not (np.sort(orders, axis=1) == np.arange(total)).all():
        raise UsageError(f"orders must be [{batch}, {total}], each row a permutation of 0..{total - 1}")
    branch_labels = np.array([labels, [architecture.null_label] * batch], dtype=np.int64)
    return GenerationJob(plan, orders, branch_labels, seeds, noise)


def diffusion_chain(
    step: ARStep, settings: PlanSettings, predict: Integers, refined: NDArray[np.bool_], noise: NoiseSource
) -> DiffusionChain:
    """The reverse steps of one AR step: refined and plain tokens in one chain, aligned at their ends.

    Args:
        step: the plan's entry.
        settings: respacing and temperature.
        predict: int64 [B, P].
        refined: bool [B, P].
        noise: the noise of every token.
    """
    images = np.repeat(np.arange(len(predict)), predict.shape[1])
    positions, extra = predict.ravel(), refined.ravel()
    groups = [(np.flatnonzero(~extra), step.diffusion_steps), (np.flatnonzero(extra), step.refined_diffusion_steps)]
    groups = sorted((group for group in groups if len(group[0])), key=lambda group: -group[1])
    rows = np.concatenate([members for members, _ in groups])
    draws = [noise.draw(images[members], positions[members], count) for members, count in groups]
    sizes = tuple((len(members), count) for members, count in groups)
    tables = _cached_tables if len(rows) <= CACHED_ROWS else _reverse_tables

    segments: list[ChainSegment] = []
    for start, end, timesteps, coefficients in tables(sizes, settings.max_timestep, settings.temperature):
        active = [(count, draw) for (_, count), draw in zip(groups, draws, strict=True) if count >= start]
        noises = [draw[:, 1 + count - start : 1 + count - end].transpose(1, 0, 2) for count, draw in active]
        segments.append(
            ChainSegment(
                rows=timesteps.shape[1],
                timesteps=timesteps,
                coefficients=coefficients,
                noise=np.ascontiguousarray(np.concatenate(noises, axis=1)),
            )
        )
    return DiffusionChain(
        rows=rows,
        x=np.concatenate([draw[:, 0] for draw in draws]),
        guidance=np.full(len(rows), step.guidance, dtype=np.float32),
        segments=tuple(segments),
    )


def _reverse_tables(
    groups: tuple[tuple[int, int], ...], max_timestep: int, temperature: float
) -> tuple[tuple[int, int, Integers, Floats], ...]:
    """Per segment: reverse steps left at its start and at its end, timesteps [S, n], coefficients [S, n, K].

    Not to be written to: small ones are kept.

    Args:
        groups: rows and reverse steps of each group, by falling steps.
    """
    segments = []
    for active in range(1, len(groups) + 1):
        # From here until the next group joins (or the end), the first ``active`` groups run together.
        start = groups[active - 1][1]
        end = groups[active][1] if active < len(groups) else 0
        if start == end:
            continue
        timesteps, coefficients = [], []
        for rows, count in groups[:active]:
            process, window = reverse_process(count, max_timestep, temperature), slice(count - start, count - end)
            timesteps.append(np.broadcast_to(process.timesteps[window, None], (start - end, rows)))
            table = process.coefficients[window, None]
            coefficients.append(np.broadcast_to(table, (start - end, rows, len(COEFFICIENTS))))
        segments.append((start, end, np.concatenate(timesteps, axis=1), np.concatenate(coefficients, axis=1)))
    return tuple(segments)


_cached_tables = lru_cache(maxsize=64)(_reverse_tables)
