"""Token orders against the definitions in the GtR paper, evaluated square by square in plain Python."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_deploy.runtime.errors import PlanError
from gtr_deploy.runtime.sampling.orders import ORDERS, generation_orders, halton_order, stage_sets

GRIDS = st.tuples(st.integers(1, 20), st.integers(1, 20))
SEEDS = st.integers(0, 2**64 - 1)


def expected_sets(grid: tuple[int, int], stages: int, shift: int = 0) -> list[list[int]]:
    """U_k holds the squares with (i+j) mod 2^k = 2^(k-1); S_K = U_1, S_(K-1) = U_2, ..., S_1 the rest."""
    sets: list[list[int]] = [[] for _ in range(stages)]
    for i in range(grid[0]):
        for j in range(grid[1]):
            stage = 0
            for k in range(1, stages):
                if (i + j + shift) % 2**k == 2 ** (k - 1):
                    stage = stages - k
            sets[stage].append(i * grid[1] + j)
    return sets


def scaled_radical_inverse(index: int, base: int, size: int) -> int:
    """floor(size * radical inverse), in whole numbers."""
    digits, power = 0, 1
    while index:
        digits, power, index = digits * base + index % base, power * base, index // base
    return digits * size // power


@settings(deadline=None, max_examples=150)
@given(grid=GRIDS, stages=st.integers(1, 5), parity=st.sampled_from(["odd", "even"]))
def test_stage_sets_are_the_papers(grid: tuple[int, int], stages: int, parity: str) -> None:
    wanted = expected_sets(grid, stages, shift=int(parity == "even"))
    empty = [index for index, members in enumerate(wanted) if not members]
    if empty:
        with pytest.raises(PlanError) as error:
            stage_sets(grid, stages, parity)
        assert str(error.value) == (
            f"stage {empty[0] + 1} of {stages} has no token on a {grid[0]}x{grid[1]} grid; use fewer stages"
        )
        return
    found = [members.tolist() for members in stage_sets(grid, stages, parity)]
    assert found == wanted
    assert sorted(position for members in found for position in members) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize(
    ("grid", "stages", "sizes"),
    [
        ((16, 16), 1, [256]),
        ((16, 16), 2, [128, 128]),
        ((16, 16), 3, [64, 64, 128]),
        ((32, 32), 4, [128, 128, 256, 512]),
        ((8, 8), 3, [16, 16, 32]),
        ((3, 5), 2, [8, 7]),
    ],
)
def test_stage_sizes(grid: tuple[int, int], stages: int, sizes: list[int]) -> None:
    assert [len(members) for members in stage_sets(grid, stages)] == sizes


def test_three_stages_drawn_by_hand() -> None:
    board = np.empty(16, dtype=int)
    for stage, members in enumerate(stage_sets((4, 4), 3)):
        board[members] = stage + 1
    assert board.reshape(4, 4).tolist() == [[1, 3, 2, 3], [3, 2, 3, 1], [2, 3, 1, 3], [3, 1, 3, 2]]


def test_last_stage_is_the_odd_squares_and_even_parity_the_others() -> None:
    odd = [i * 7 + j for i in range(5) for j in range(7) if (i + j) % 2 == 1]
    even = [i * 7 + j for i in range(5) for j in range(7) if (i + j) % 2 == 0]
    assert stage_sets((5, 7), 3)[-1].tolist() == odd
    assert stage_sets((5, 7), 3, "even")[-1].tolist() == even


def test_even_parity_is_the_board_moved_by_one_column() -> None:
    wide = stage_sets((6, 10), 4, "odd")
    for found, members in zip(stage_sets((6, 9), 4, "even"), wide, strict=True):
        assert found.tolist() == [p // 10 * 9 + p % 10 - 1 for p in members.tolist() if p % 10]


@pytest.mark.parametrize(
    ("grid", "stages", "message"),
    [
        ((1, 1), 2, "stage 2 of 2 has no token on a 1x1 grid; use fewer stages"),
        ((2, 2), 4, "stage 2 of 4 has no token on a 2x2 grid; use fewer stages"),
        ((8, 8), 0, "0 stages: at least one is needed"),
    ],
)
def test_stages_that_do_not_fit(grid: tuple[int, int], stages: int, message: str) -> None:
    with pytest.raises(PlanError) as error:
        stage_sets(grid, stages)
    assert str(error.value) == message


def test_unknown_names() -> None:
    with pytest.raises(PlanError, match=r"^parity 'left' is not one of odd, even$"):
        stage_sets((8, 8), 2, "left")
    with pytest.raises(PlanError, match=r"^parity 'left' is not one of odd, even$"):
        generation_orders("gtr", (8, 8), 2, "left", [1])
    with pytest.raises(PlanError, match=r"^order 'spiral' is not one of gtr, random, raster, halton$"):
        generation_orders("spiral", (8, 8), 2, "odd", [1])


@settings(deadline=None, max_examples=60)
@given(
    order=st.sampled_from(ORDERS),
    grid=st.tuples(st.integers(2, 12), st.integers(3, 12)),
    parity=st.sampled_from(["odd", "even"]),
    seeds=st.lists(SEEDS, min_size=1, max_size=4),
)
def test_orders_are_permutations_that_depend_on_the_seed_alone(
    order: str, grid: tuple[int, int], parity: str, seeds: list[int]
) -> None:
    orders = generation_orders(order, grid, 3, parity, seeds)
    assert orders.dtype == np.int64
    assert orders.shape == (len(seeds), grid[0] * grid[1])
    for seed, row in zip(seeds, orders, strict=True):
        assert sorted(row.tolist()) == list(range(grid[0] * grid[1]))
        assert (generation_orders(order, grid, 3, parity, [seed])[0] == row).all()
    assert (generation_orders(order, grid, 3, parity, seeds[::-1]) == orders[::-1]).all()


@settings(deadline=None, max_examples=40)
@given(grid=st.tuples(st.integers(4, 12), st.integers(4, 12)), stages=st.integers(1, 3), seed=SEEDS)
def test_gtr_goes_stage_after_stage(grid: tuple[int, int], stages: int, seed: int) -> None:
    (row,) = generation_orders("gtr", grid, stages, "odd", [seed])
    start = 0
    for members in expected_sets(grid, stages):
        assert sorted(row[start : start + len(members)].tolist()) == members
        start += len(members)


def test_gtr_order_inside_a_stage_is_random_per_image() -> None:
    orders = generation_orders("gtr", (8, 8), 3, "odd", range(1600))
    # Each of the 16 tokens of S_1 should be first in about 100 of 1600 images; 5 standard deviations are 48.
    counts = np.bincount(orders[:, 0], minlength=64)[expected_sets((8, 8), 3)[0]]
    assert counts.sum() == 1600
    assert (np.abs(counts - 100) < 48).all()
    assert len({tuple(row) for row in orders.tolist()}) == 1600


@pytest.mark.parametrize("order", ["random", "gtr"])
def test_neighbouring_and_extreme_seeds_differ(order: str) -> None:
    seeds: Sequence[int] = [0, 1, 2, 2**32, 2**63, 2**64 - 1]
    rows = generation_orders(order, (16, 16), 3, "odd", seeds)
    assert len({tuple(row) for row in rows.tolist()}) == len(seeds)


def test_random_order_ignores_stages() -> None:
    (row,) = generation_orders("random", (16, 16), 3, "odd", [5])
    assert (generation_orders("random", (16, 16), 1, "even", [5])[0] == row).all()
    # Mean (i+j) parity of the first half: a checkerboard order would have none of the odd squares there.
    odd = ((row[:128] // 16 + row[:128] % 16) % 2).sum()
    assert 40 < odd < 88


def test_one_random_order_per_image_whatever_the_stages() -> None:
    """An image's gtr order is its random order sorted by stage, so stages are not correlated with each other."""
    for seed in (5, 6):
        (wanted,) = generation_orders("random", (16, 16), 1, "odd", [seed]).tolist()
        (found,) = generation_orders("gtr", (16, 16), 3, "odd", [seed]).tolist()
        sets = expected_sets((16, 16), 3)
        assert found == [position for members in sets for position in wanted if position in set(members)]


def test_raster_is_row_by_row_for_every_image() -> None:
    assert generation_orders("raster", (3, 4), 2, "odd", [1, 2]).tolist() == [list(range(12))] * 2


def test_halton_starts_as_computed_by_hand() -> None:
    # Index 1..8 in base 2: 1/2 1/4 3/4 1/8 5/8 3/8 7/8 1/16; in base 3: 1/3 2/3 1/9 4/9 7/9 2/9 5/9 8/9; times 16.
    wanted = [(8, 5), (4, 10), (12, 1), (2, 7), (10, 12), (6, 3), (14, 8), (1, 14)]
    assert halton_order((16, 16))[:8].tolist() == [row * 16 + column for row, column in wanted]
    assert (generation_orders("halton", (16, 16), 1, "odd", [3, 4]) == halton_order((16, 16))).all()


@settings(deadline=None, max_examples=60)
@given(grid=st.tuples(st.integers(1, 16), st.integers(1, 16)))
def test_halton_equals_exact_arithmetic(grid: tuple[int, int]) -> None:
    wanted: dict[int, None] = {}
    index = 1
    while len(wanted) < grid[0] * grid[1]:
        row, column = scaled_radical_inverse(index, 2, grid[0]), scaled_radical_inverse(index, 3, grid[1])
        wanted.setdefault(row * grid[1] + column)
        index += 1
    assert halton_order(grid).tolist() == list(wanted)


def test_halton_spreads_tokens_evenly() -> None:
    # On a grid of 2^3 x 3^2, six consecutive Halton points fall into six different blocks of 4 x 3 tokens.
    order = halton_order((8, 9))
    blocks = order // 9 // 4 * 3 + order % 9 // 3
    for start in range(72 - 5):
        assert sorted(blocks[start : start + 6].tolist()) == list(range(6))
    # On the ImageNet grid, after a quarter of the tokens every 4 x 4 block has about a quarter of its own.
    start = halton_order((16, 16))[:64]
    counts = np.bincount(start // 16 // 4 * 4 + start % 16 // 4, minlength=16)
    assert counts.min() >= 3
    assert counts.max() <= 5
