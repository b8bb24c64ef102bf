"""How the reverse steps of one AR step divide between refined and plain tokens, and the tables they run with.

Tokens with the longer chain run alone at first; then all run together, and both chains end together, so that rows with
50 and with 20 steps cost 50 calls, not 70. The host loop, the device's layout and the engine profiles all read this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .diffusion import ReverseProcess, reverse_process
from .noise import NoiseSource
from .plan import ARStep, FittedSettings

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

CACHED_ROWS = 256
"""Tables of chains up to this many rows are kept: there they would cost as much as a small head's own work. At most
some 25 MB."""

MODULATION_ROWS = 256
"""Rows whose modulation is made at once, where one reverse step does not have more: with fewer, the head's weights are
read again sooner; more gain nothing and cost (3 depth + 2) W numbers each, 82 KB for mar-b. Measured, see
docs/performance.md. [ours]"""


@dataclass(frozen=True)
class ChainShape:
    """How the reverse steps of one AR step divide, for one image; both chains end together.

    Attributes:
        longer: tokens with the longer chain that run alone at first; 0 where all chains are equally long.
        alone: reverse steps that they take alone.
        common: reverse steps that all tokens take together.
        refined_longer: whether the longer chain is that of the refined tokens.
    """

    longer: int
    alone: int
    common: int
    refined_longer: bool


def chain_shape(step: ARStep) -> ChainShape:
    """Of one AR step."""
    plain, refined = step.diffusion_steps, step.refined_diffusion_steps
    if step.refined == 0:
        return ChainShape(0, 0, plain, False)
    if step.refined == step.predicted or plain == refined:
        return ChainShape(0, 0, refined, False)
    longer = step.refined if refined > plain else step.predicted - step.refined
    return ChainShape(longer, abs(refined - plain), min(refined, plain), refined > plain)


@dataclass(frozen=True)
class ChainTables:
    """The reverse steps of one AR step, per token: those that the longer chain takes alone, which may be none, and the
    common ones, of the longer chain and of the other."""

    alone: ReverseProcess
    long: ReverseProcess
    short: ReverseProcess


def chain_tables(shape: ChainShape, max_timestep: int, temperature: float) -> ChainTables:
    """Of chains that divide like this."""
    longer = reverse_process(shape.alone + shape.common, max_timestep, temperature)
    short = reverse_process(shape.common, max_timestep, temperature)
    return ChainTables(longer.part(0, shape.alone), longer.part(shape.alone), short)


@dataclass(frozen=True)
class ChainSegment:
    """Consecutive reverse steps over the same rows.

    Attributes:
        rows: n; the first n rows of the chain take part.
        timesteps: int64 [S, n].
        coefficients: float32 [S, n, K], see ``graphs.COEFFICIENTS``.
        noise: float32 [S, n, C].
    """

    rows: int
    timesteps: Integers
    coefficients: Floats
    noise: Floats


@dataclass(frozen=True)
class DiffusionChain:
    """All reverse steps of one AR step, of one batch.

    Attributes:
        rows: int64 [N], for each row of the chain its row in z seen as [G, B * P, D]; those of the longer chain first.
        x: float32 [N, C], x_T of each row.
        guidance: float32 [N].
        segments: in the order they run; row counts never fall.
    """

    rows: Integers
    x: Floats
    guidance: Floats
    segments: tuple[ChainSegment, ...]


def diffusion_chain(
    step: ARStep, settings: FittedSettings, predict: Integers, refined: NDArray[np.bool_], noise: NoiseSource
) -> DiffusionChain:
    """The reverse steps of one AR step for a batch; ``predict`` int64 [B, P], ``refined`` bool [B, P]."""
    shape = chain_shape(step)
    alone, common = shape.alone, shape.common
    long = (refined.ravel() == shape.refined_longer) & bool(shape.longer)
    images, positions = np.repeat(np.arange(len(predict)), predict.shape[1]), predict.ravel()
    groups = [(np.flatnonzero(members), count) for members, count in ((long, alone + common), (~long, common))]
    rows = np.concatenate([members for members, _ in groups])
    draws = [noise.draw(images[members], positions[members], count) for members, count in groups if len(members)]
    noises = [draws[0][:, 1 : 1 + alone]] if alone else []
    noises.append(np.concatenate([draw[:, -common:] for draw in draws]))
    sizes = len(groups[0][0]), len(groups[1][0])
    row_tables = _cached_tables if len(rows) <= CACHED_ROWS else _row_tables
    tables = row_tables(shape, sizes, settings.max_timestep, settings.temperature)
    segments = [
        ChainSegment(timesteps.shape[1], timesteps, coefficients, np.ascontiguousarray(part.transpose(1, 0, 2)))
        for (timesteps, coefficients), part in zip(tables, noises, strict=True)
    ]
    guidance = np.full(len(rows), step.guidance, dtype=np.float32)
    return DiffusionChain(rows, np.concatenate([draw[:, 0] for draw in draws]), guidance, tuple(segments))


def device_draw(step: ARStep, predict: Integers) -> tuple[Integers, Integers, int]:
    """What a device needs of the noise in one AR step, as ``NoiseSource.draw`` takes it: before it has chosen, every
    token may have the longer chain. ``predict`` is int64 [B, P]."""
    shape = chain_shape(step)
    return np.repeat(np.arange(len(predict)), step.predicted), predict.ravel(), shape.alone + shape.common


def modulation_parts(steps: int, rows: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive reverse steps that have their modulation made together; as equal as can be, so that
    there are two sizes at most. ``rows`` is G N, the condition vectors of one reverse step."""
    count = -(-steps // max(1, MODULATION_ROWS // rows))
    edges = [steps * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def modulation_rows(timesteps: Integers, branches: int) -> tuple[Integers, Integers]:
    """``row`` and ``timestep`` [S G n] of the modulation graph for timesteps [S, n]: reverse step, branch, token."""
    steps, rows = timesteps.shape
    row = np.tile(np.arange(branches * rows), steps)
    return row, np.repeat(timesteps[:, None], branches, axis=1).reshape(-1)


def _row_tables(
    shape: ChainShape, sizes: tuple[int, int], max_timestep: int, temperature: float
) -> list[tuple[Integers, Floats]]:
    """Per segment timesteps [S, n] and coefficients [S, n, K], for so many rows with the longer chain, and others. Not
    to be written to: small ones are kept."""
    tables, (longer, others) = chain_tables(shape, max_timestep, temperature), sizes
    segments = [[(tables.alone, longer)]] if shape.alone else []
    segments.append([(tables.long, longer), (tables.short, others)])

    def by_row(groups: list[tuple[ReverseProcess, int]], table: str) -> NDArray[Any]:
        parts = [np.repeat(getattr(part, table)[:, None], rows, axis=1) for part, rows in groups]
        return np.concatenate(parts, axis=1)

    return [(by_row(groups, "timesteps"), by_row(groups, "coefficients")) for groups in segments]


_cached_tables = lru_cache(maxsize=64)(_row_tables)
