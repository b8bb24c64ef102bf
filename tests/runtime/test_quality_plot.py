"""The picture of quality against time: what is on the front, and where the pixels are."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gtr_deploy.runtime.errors import GtrError, UsageError
from gtr_deploy.runtime.pictures import charts
from gtr_deploy.runtime.pictures.charts import checked_target, new_figure
from gtr_deploy.runtime.quality.estimates import Estimate
from gtr_deploy.runtime.quality.plot import Point, front, overlap, plot_front, undecided


def _points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(f"p{i}", cost, Estimate(value, 0.9 * value, 1.1 * value)) for i, (cost, value) in enumerate(pairs)]


def test_front_is_what_nothing_beats() -> None:
    points = _points((1, 9), (2, 5), (3, 6), (4, 5), (5, 1), (2, 7))
    assert [p.name for p in front(points)] == ["p0", "p1", "p4"]


def _point(name: str, cost: float, low: float | None, value: float, high: float | None) -> Point:
    return Point(name, cost, Estimate(value, low, high))


def test_where_intervals_overlap_no_winner_is_drawn() -> None:
    fast, same = _point("fast", 1, 4, 5, 6), _point("same", 2, 3, 4, 5)
    better, worse = _point("better", 3, 1, 2, 2.5), _point("worse", 4, 7, 8, 9)
    alone = _point("alone", 5, None, 1, None)
    assert undecided([fast, same, better, worse, alone]) == [same]
    assert not overlap(alone.quality, better.quality)
    assert undecided([fast, _point("", 2, 4, 5, 6)]) == []


def test_undecided_points_are_hollow(tmp_path: Path) -> None:
    def blue(name: str, *points: Point) -> int:
        plot_front(tmp_path / name, "title", points, "seconds", "Frechet distance")
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        return int((pixels == (0x00, 0x72, 0xB2)).all(axis=-1).sum())

    fast = _point("fast", 1, 4, 5, 6)
    clear, touching = _point("slow", 2, 1.9, 2.9, 3.9), _point("slow", 2, 2.1, 3.1, 4.1)
    assert blue("overlap.png", fast, touching) < blue("clear.png", fast, clear) - 50


def test_points_are_where_their_numbers_are(tmp_path: Path) -> None:
    target = tmp_path / "new" / "plot.png"
    plot_front(target, "title", _points((0.2, 5), (0.8, 3), (0.9, 40)), "seconds", "Frechet distance")
    pixels = np.asarray(Image.open(target).convert("RGB"))
    rows, columns = np.nonzero((pixels == (0x00, 0x72, 0xB2)).all(axis=-1))
    left, right = columns < np.median(columns), columns > np.median(columns)
    # The better of the two on the front stands lower: 3 below 5; the slower one further right.
    assert rows[right].mean() > rows[left].mean()
    assert columns[right].mean() > columns[left].mean() + 200


@pytest.mark.parametrize("values", [(5.0, 5.0), (0.0, 0.0), (-2.0, 3.0), (1e-9, 1e9)])
def test_any_numbers_can_be_drawn(tmp_path: Path, values: tuple[float, float]) -> None:
    points = [Point("named", values[0], Estimate(values[1], 0.0, values[1])), Point("", values[1], Estimate(values[0]))]
    plot_front(tmp_path / "plot.png", "title", points, "x", "y")
    assert Image.open(tmp_path / "plot.png").width > 900


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (lambda: checked_target(tmp_path / "a.png"), lambda: new_figure(5, 5, "title")):
        with pytest.raises(GtrError, match=r"pip install 'gtr-deploy\[plot\]'"):
            call()


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
