"""In which order the tokens of an image are made: GtR's checkerboard stages, and the orders it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError
from .noise import order_priorities

ORDERS = ("gtr", "random", "raster", "halton")
PARITIES = ("odd", "even")


def stage_sets(grid: tuple[int, int], stages: int, parity: str = "odd") -> list[NDArray[np.int64]]:
    """GtR's disjoint sets S_1..S_K of token positions, each ascending [paper].

    U_k = {(i, j): (i + j) mod 2^k = 2^(k-1)} for k = 1..K-1; S_1 is what is left, then U_(K-1), ..., and S_K = U_1, the
    odd squares of the checkerboard. ``parity="even"`` swaps the colours of the board [ours].

    Raises:
        PlanError: a stage would have no token on this grid, or an unknown parity.
    """
    if parity not in PARITIES:
        raise PlanError(f"parity {parity!r} is not one of {', '.join(PARITIES)}")
    if stages < 1:
        raise PlanError(f"{stages} stages: at least one is needed")
    if stages > 64:  # no picture has a diagonal of 2**63 tokens
        raise PlanError(f"{stages} stages on a {grid[0]}x{grid[1]} grid; use fewer stages")
    rows, columns = np.indices(grid)
    diagonal = (rows + columns + (parity == "even")).ravel()
    remainder = np.ones(diagonal.shape, dtype=bool)
    sets: list[NDArray[np.int64]] = []
    for k in range(1, stages):
        member = diagonal % 2**k == 2 ** (k - 1)
        remainder &= ~member
        sets.append(np.flatnonzero(member))
    sets.append(np.flatnonzero(remainder))
    sets.reverse()
    for index, positions in enumerate(sets, start=1):
        if len(positions) == 0:
            raise PlanError(f"stage {index} of {stages} has no token on a {grid[0]}x{grid[1]} grid; use fewer stages")
    return sets


def halton_order(grid: tuple[int, int]) -> NDArray[np.int64]:
    """Positions [L] in the order of the Halton sequence, base 2 down and base 3 across, repeats left out.

    The low-discrepancy order of Halton-MaskGIT (Besnier et al., ICLR 2025); the bases and their axes are [ours].
    """
    order: dict[int, None] = {}
    for index in count(1):
        row, column = _radical_inverse_cell(index, 2, grid[0]), _radical_inverse_cell(index, 3, grid[1])
        order[row * grid[1] + column] = None  # which keeps its first place
        if len(order) == grid[0] * grid[1]:
            break
    return np.array(list(order), dtype=np.int64)


def _radical_inverse_cell(index: int, base: int, cells: int) -> int:
    """The cell 0..cells-1 in which the radical inverse of ``index`` falls; in whole numbers, which do not round."""
    reversed_digits, power = 0, 1
    while index:
        index, digit = divmod(index, base)
        reversed_digits, power = reversed_digits * base + digit, power * base
    return reversed_digits * cells // power


def generation_orders(
    order: str, grid: tuple[int, int], stages: int, parity: str, seeds: Sequence[int]
) -> NDArray[np.int64]:
    """Token positions [B, L] in the order they are made, one row per image seed.

    ``gtr``: stage after stage, random inside a stage and per image [paper]. ``random``: per image. ``raster`` and
    ``halton``: the same for every image.

    Raises:
        PlanError: unknown order, or see :func:`stage_sets`.
    """
    total = grid[0] * grid[1]
    if order == "raster":
        return np.tile(np.arange(total, dtype=np.int64), (len(seeds), 1))
    if order == "halton":
        return np.tile(halton_order(grid), (len(seeds), 1))
    if order == "random":
        sets = [np.arange(total, dtype=np.int64)]
    elif order == "gtr":
        sets = stage_sets(grid, stages, parity)
    else:
        raise PlanError(f"order {order!r} is not one of {', '.join(ORDERS)}")
    rows: list[NDArray[np.int64]] = []
    for seed in seeds:
        priorities = order_priorities(seed, total)
        rows.append(np.concatenate([s[np.argsort(priorities[s], kind="stable")] for s in sets]))
    return np.stack(rows)
