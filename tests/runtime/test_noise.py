"""Noise is a pure function of (image seed, token position, index), and it is standard normal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from recorded import RecordedNoise

from gtr_deploy.runtime.errors import UsageError
from gtr_deploy.runtime.sampling.noise import (
    SeededNoise,
    _normals,
    checked_seed,
    order_priorities,
    selection_priorities,
)

SEEDS = st.integers(0, 2**64 - 1)


def draw(seed: int, positions: list[int], steps: int, channels: int = 16) -> NDArray[np.float32]:
    """Noise of some tokens of one image."""
    return SeededNoise([seed], channels).draw(np.zeros(len(positions), dtype=np.int64), np.array(positions), steps)


def test_pinned_values() -> None:
    # Computed once. They must never change: users keep seeds, and documentation shows images made from them.
    noise = SeededNoise([0, 1234567890123456789], 3).draw(np.array([0, 1, 1]), np.array([0, 0, 255]), 1)
    wanted = [
        [[2.916203260421753, 0.6468852758407593, -1.2855403423309326], [-1.09029829502, -1.39015722275, 1.56724429131]],
        [[2.2141833305358887, 1.0578269958496094, -2.1493420600891113], [-0.79299813509, 0.72709292173, 1.05746698380]],
        [[-1.2673234939575195, 1.567283034324646, 0.7810096740722656], [0.67404550314, 1.37659311295, 0.35908800364]],
    ]
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise, wanted, rtol=1e-6)
    assert order_priorities(0, 3).tolist() == [15003734204198539638, 13859618513508960101, 12389738016430293093]
    assert order_priorities(2**64 - 1, 2).tolist() == [12079472389394220099, 14346830830234300966]
    assert selection_priorities(0, 3).tolist() == [15023647771317767168, 8110679283269960230, 5528858672019317250]


@settings(deadline=None, max_examples=50)
@given(data=st.data(), seeds=st.lists(SEEDS, min_size=1, max_size=4), channels=st.sampled_from([1, 3, 16]))
def test_each_token_has_its_own_noise_whatever_is_drawn_with_it(
    data: st.DataObject, seeds: list[int], channels: int
) -> None:
    pairs = data.draw(st.lists(st.tuples(st.integers(0, len(seeds) - 1), st.integers(0, 1023)), min_size=1, max_size=8))
    steps = data.draw(st.integers(0, 12))
    images, positions = np.array(pairs).T
    together = SeededNoise(seeds, channels).draw(images, positions, steps)
    assert together.shape == (len(pairs), 1 + steps, channels)
    for row, (image, position) in enumerate(pairs):
        assert (draw(seeds[image], [position], steps, channels)[0] == together[row]).all()


@settings(deadline=None, max_examples=50)
@given(
    seed=SEEDS,
    position=st.integers(0, 1023),
    few=st.integers(0, 20),
    more=st.integers(0, 80),
    channels=st.integers(1, 17),
)
def test_fewer_steps_are_a_prefix_of_more(seed: int, position: int, few: int, more: int, channels: int) -> None:
    long = draw(seed, [position], few + more, channels)
    assert (draw(seed, [position], few, channels) == long[:, : 1 + few]).all()


@settings(deadline=None, max_examples=100)
@given(
    tokens=st.lists(st.tuples(SEEDS, st.integers(0, 2**20)), min_size=1, max_size=12),
    steps=st.integers(0, 60),
    channels=st.integers(1, 17),
)
def test_words_are_those_of_a_generator_for_each_token(
    tokens: list[tuple[int, int]], steps: int, channels: int
) -> None:
    """The definition, as written down: Philox with the key (seed, 0) and the position in the counter."""
    seeds, positions = zip(*tokens, strict=True)
    found = SeededNoise(seeds, channels).draw(np.arange(len(tokens)), np.array(positions), steps)
    count = (1 + steps) * channels
    for row, (seed, position) in enumerate(tokens):
        words = np.random.Philox(key=seed, counter=position << 64).random_raw((count + 1) // 2)
        radius = np.sqrt(-2.0 * np.log(((words >> np.uint64(32)) + 0.5) * 2.0**-32))
        angle = (words & np.uint64(2**32 - 1)) * (2.0 * np.pi * 2.0**-32)
        wanted = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)[:count]
        assert (found[row].reshape(-1) == wanted.astype(np.float32)).all()


def test_drawing_twice_gives_the_same() -> None:
    source = SeededNoise([5, 6], 16)
    images, positions = np.array([0, 1]), np.array([3, 3])
    assert (source.draw(images, positions, 4) == source.draw(images, positions, 4)).all()


def test_seeds_and_positions_differ() -> None:
    seeds = [0, 1, 2, 2**32, 2**63, 2**64 - 1]
    rows = np.concatenate([draw(seed, [0, 1, 2, 255, 1023], 3).reshape(5, -1) for seed in seeds])
    assert len({row.tobytes() for row in rows}) == 30
    # No value of one token turns up again elsewhere, shifted or not: the streams do not overlap.
    assert len(np.unique(rows)) > 0.999 * rows.size


def test_neighbouring_positions_do_not_overlap_however_long_the_chain() -> None:
    long, other = draw(9, [0], 1000).ravel(), draw(9, [1], 3).ravel()
    assert not np.isin(other[:8], long).any()


def test_streams_differ() -> None:
    order, selection = order_priorities(11, 64), selection_priorities(11, 64)
    assert not np.isin(order, selection).any()
    assert order.dtype == selection.dtype == np.uint64
    # Priorities of a longer list begin with those of a shorter one.
    assert (order_priorities(11, 16) == order[:16]).all()
    # Noise is made from a third stream: the upper halves of its words would give the radius of the first pair.
    first, second = draw(11, [0], 0)[0, 0, :2].astype(np.float64).tolist()
    for stream in (order, selection):
        radius = math.sqrt(-2 * math.log(((int(stream[0]) >> 32) + 0.5) / 2**32))
        assert abs(math.hypot(first, second) - radius) > 1e-3


def test_extreme_words_give_finite_normals() -> None:
    # Upper half 0: radius sqrt(-2 log(2^-33)); upper half all ones: nearly 0. Lower half: the angle in turns of 2^-32.
    words = np.array([[0, 2**30, 2**31, 2**64 - 2**32]], dtype=np.uint64)
    far = math.sqrt(66 * math.log(2))
    np.testing.assert_allclose(_normals(words), [[far, 0, 0, far, -far, 0, 2**-16, 0]], rtol=1e-6, atol=1e-14)


def test_noise_is_standard_normal() -> None:
    values = np.concatenate([draw(seed, list(range(16)), 24) for seed in range(20)]).astype(np.float64)
    flat = np.sort(values.ravel())
    count = flat.size  # 128,000
    assert count == 20 * 16 * 25 * 16
    assert abs(flat.mean()) < 4 / math.sqrt(count)
    assert abs(flat.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((flat**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((flat**4).mean() - 3) < 4 * math.sqrt(96 / count)
    # Kolmogorov-Smirnov distance to the normal distribution; 1.63 / sqrt(n) is the 1 % level.
    normal = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in flat])
    empirical = np.arange(count) / count
    assert max((normal - empirical).max(), (empirical + 1 / count - normal).max()) < 1.63 / math.sqrt(count)
    # Tokens, reverse steps and channels are uncorrelated; Box-Muller pairs are neighbouring channels.
    for a, b in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:]), (values[..., 0::2], values[..., 1::2])):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.size)
        assert abs((a**2 * b**2).mean() - 1) < 4 * math.sqrt(8 / a.size)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, np.int64(7), np.uint64(2**64 - 1)])
def test_good_seeds(seed: int) -> None:
    assert checked_seed(seed) == int(seed)
    assert type(checked_seed(seed)) is int
    assert (draw(seed, [0], 1) == draw(int(seed), [0], 1)).all()


@pytest.mark.parametrize("seed", [-1, 2**64, True, False, 1.0, "1", None, np.int64(-1), np.float64(2.0)])
def test_bad_seeds(seed: int) -> None:
    for function in (
        lambda: checked_seed(seed),
        lambda: SeededNoise([0, seed], 16),
        lambda: order_priorities(seed, 4),
        lambda: selection_priorities(seed, 4),
    ):
        with pytest.raises(UsageError) as error:
            function()
        assert str(error.value) == f"seed {seed!r} is not an integer in 0..2^64-1"


def test_recorded_noise_is_replayed() -> None:
    initial = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    steps = 100 + np.arange(2 * 4 * 5 * 3, dtype=np.float32).reshape(2, 4, 5, 3)
    found = RecordedNoise(initial, steps).draw(np.array([1, 0]), np.array([2, 3]), 2)
    assert found.shape == (2, 3, 3)
    assert found[0].tolist() == [initial[1, 2].tolist(), steps[1, 2, 0].tolist(), steps[1, 2, 1].tolist()]
    assert found[1].tolist() == [initial[0, 3].tolist(), steps[0, 3, 0].tolist(), steps[0, 3, 1].tolist()]


@pytest.mark.parametrize(
    ("initial", "steps"),
    [
        ((2, 4), (2, 4, 5, 3)),
        ((2, 4, 3), (2, 4, 3)),
        ((2, 4, 3), (2, 4, 5, 2)),
        ((2, 4, 3), (2, 5, 5, 3)),
        ((1, 4, 3), (2, 4, 5, 3)),
    ],
)
def test_recorded_noise_shapes(initial: tuple[int, ...], steps: tuple[int, ...]) -> None:
    with pytest.raises(UsageError) as error:
        RecordedNoise(np.zeros(initial, dtype=np.float32), np.zeros(steps, dtype=np.float32))
    assert str(error.value) == f"recorded noise must be [B, L, C] and [B, L, T, C], got {initial} and {steps}"


def test_recorded_noise_with_too_few_steps() -> None:
    source = RecordedNoise(np.zeros((1, 4, 3), dtype=np.float32), np.zeros((1, 4, 5, 3), dtype=np.float32))
    assert source.draw(np.array([0]), np.array([0]), 5).shape == (1, 6, 3)
    with pytest.raises(UsageError, match=r"^the recorded noise has 5 reverse steps, the plan asks for 6$"):
        source.draw(np.array([0]), np.array([0]), 6)
