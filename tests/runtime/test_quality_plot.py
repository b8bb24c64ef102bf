"""The picture of quality against time: what is on the front, and where the pixels are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gtr_deploy.runtime.errors import GtrError, UsageError
from gtr_deploy.runtime.quality.estimates import Estimate
from gtr_deploy.runtime.quality.plot import FRONT, Axis, Point, checked_target, front, plot_front


def _points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(f"p{i}", cost, Estimate(value, 0.9 * value, 1.1 * value)) for i, (cost, value) in enumerate(pairs)]


def test_front_is_what_nothing_beats() -> None:
    points = _points((1, 9), (2, 5), (3, 6), (4, 5), (5, 1), (2, 7))
    assert [p.name for p in front(points)] == ["p0", "p1", "p4"]
    assert [p.name for p in front(points, more_is_better=True)] == ["p0"]


@pytest.mark.parametrize("values", [(0.1, 50.0), (3.0, 4.0), (5.0, 5.0), (0.0, 0.0), (-2.0, 3.0), (1e-9, 1e9)])
def test_axes_hold_their_values_and_have_round_ticks(values: tuple[float, float]) -> None:
    axis = Axis.over(values, 500, 100)
    for value in values:
        assert 100 <= axis.at(value) <= 500
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 25
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    leading = {round(abs(t) / 10 ** math.floor(math.log10(abs(t))), 9) for t in ticks if t}
    assert all(round(digit * 10, 6) == round(digit * 10) for digit in leading)


def test_points_are_where_their_numbers_are(tmp_path: Path) -> None:
    target = tmp_path / "new" / "plot.png"
    plot_front(target, "title", _points((0.2, 5), (0.8, 3), (0.9, 40)), "seconds", "Frechet distance")
    pixels = np.asarray(Image.open(target).convert("RGB"))
    rows, columns = np.nonzero((pixels == FRONT).all(axis=-1))
    left, right = columns < np.median(columns), columns > np.median(columns)
    # The better of the two stands lower: 3 below 5; the slower one further right.
    assert rows[right].mean() > rows[left].mean()
    assert columns[right].mean() > columns[left].mean() + 200


def test_targets_are_tried_before_the_work(tmp_path: Path) -> None:
    checked_target(tmp_path / "a" / "b.png")
    assert not (tmp_path / "a" / "b.png").exists()
    (tmp_path / "old.png").write_bytes(b"old")
    checked_target(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"old"
    with pytest.raises(UsageError, match=r"does not end in \.png"):
        checked_target(tmp_path / "a.jpg")
    with pytest.raises(GtrError, match="cannot be written"):
        checked_target(tmp_path / "old.png" / "x.png")
