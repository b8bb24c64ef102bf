"""Quality against time as a picture: a point per plan with its interval, and which plans nothing beats in both.

Knows numbers and names only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..errors import GtrError, UsageError
from ..files import atomic_path
from ..pictures.drawing import BACKGROUND, MARGIN, TEXT, Colour, fitted, load_font
from .estimates import Estimate

FRONT: Colour = (0, 114, 178)
BEATEN: Colour = (150, 152, 156)
LINE: Colour = (222, 222, 218)
_SIZE = (960, 600)
_LEFT, _TOP, _RIGHT, _BOTTOM = 84, 92, 28, 64
_FONT, _TITLE_FONT = 14, 17
_LOG_RATIO = 12
"""An axis whose numbers differ by more than this factor is logarithmic."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """One plan.

    Attributes:
        name: short; empty for one of a crowd, which is drawn small and without its interval.
        cost: x, seconds or FLOPs; less is better.
        quality: y with its interval.
    """

    name: str
    cost: float
    quality: Estimate


@dataclass(frozen=True)
class Axis:
    """Numbers to pixels.

    Attributes:
        low, high: its ends in numbers.
        start, end: its ends in pixels.
        log: logarithmic.
    """

    low: float
    high: float
    start: int
    end: int
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], start: int, end: int, zero: bool = False) -> Axis:
        """An axis that shows ``values`` with some room; from 0 if ``zero`` and not logarithmic."""
        low, high = min(values), max(values)
        if low > 0 and high / low > _LOG_RATIO:
            room = (high / low) ** 0.07
            return cls(low / room, high * room, start, end, True)
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(min(0.0, low) if zero else low - room, high + room, start, end, False)

    def at(self, value: float) -> float:
        """The pixel of a number; outside numbers lie outside."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers on the axis, about five."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            wide = math.log10(self.high / self.low) > 2.5
            marks = [digit * 10.0**decade for decade in decades for digit in ((1,) if wide else (1, 2, 5))]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
            marks = [step * index for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [mark for mark in marks if self.low <= mark <= self.high]


def front(points: Sequence[Point], more_is_better: bool = False) -> list[Point]:
    """The points that no other is at least as good as in both and better in one, by rising cost."""
    sign = -1 if more_is_better else 1
    best, found = math.inf, []
    for point in sorted(points, key=lambda point: (point.cost, sign * point.quality.value)):
        if sign * point.quality.value < best:
            best = sign * point.quality.value
            found.append(point)
    return found


def checked_target(path: Path) -> None:
    """Finds out before hours of work whether a PNG can be written at ``path``.

    Raises:
        UsageError: another suffix.
        GtrError: the folder cannot be made or written to.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path} does not end in .png")
    existed = path.is_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise GtrError(f"--plot {path} cannot be written: {error.strerror or error}") from None


def plot_front(
    path: Path,
    title: str,
    points: Sequence[Point],
    cost: str,
    quality: str,
    more_is_better: bool = False,
    cost_from_zero: bool = True,
) -> None:
    """Writes a PNG of points with 95 % intervals; those on the front are blue and joined.

    Args:
        path: ends in .png.
        points: at least one, all numbers finite.
        cost, quality: what the axes show, with units.
    """
    canvas = Image.new("RGB", _SIZE, BACKGROUND)
    pen, font, small = ImageDraw.Draw(canvas), load_font(_FONT), load_font(_FONT - 1)
    ends = [
        end
        for point in points
        for end in (point.quality.low, point.quality.value, point.quality.high)
        if end is not None and (end > 0 or point.quality.value <= 0)
    ]
    x = Axis.over([point.cost for point in points], _LEFT, _SIZE[0] - _RIGHT - 70, zero=cost_from_zero)
    y = Axis.over(ends, _SIZE[1] - _BOTTOM, _TOP)
    pen.text((MARGIN, MARGIN - 2), fitted(title, load_font(_TITLE_FONT), _SIZE[0] - 2 * MARGIN), TEXT, load_font(17))
    better = "higher" if more_is_better else "lower"
    key = f"{quality} ({better} is better), 95 % intervals; blue: no other value is both faster and better"
    pen.text((MARGIN, MARGIN + 24), fitted(key, font, _SIZE[0] - 2 * MARGIN), TEXT, font)
    _frame(pen, x, y, cost, small)

    best = front(points, more_is_better)
    for first, second in pairwise(best):
        corner = (x.at(second.cost), y.at(first.quality.value))
        pen.line((x.at(first.cost), y.at(first.quality.value), *corner), faded_front(), 2)
        pen.line((*corner, x.at(second.cost), y.at(second.quality.value)), faded_front(), 2)
    taken: list[Box] = []
    for point in points:
        across, down = x.at(point.cost), y.at(point.quality.value)
        colour = FRONT if point in best else BEATEN
        low, high = point.quality.low, point.quality.high
        if low is not None and high is not None and point.name:
            top, bottom = max(y.at(high), _TOP), min(y.at(low) if low > 0 or not y.log else y.start, y.start)
            pen.line((across, top, across, bottom), colour, 2)
            taken.append((across - 2, top, across + 2, bottom))
        radius = 5 if point.name else 3
        pen.ellipse((across - radius, down - radius, across + radius, down + radius), fill=colour, outline=BACKGROUND)
        taken.append((across - 6, down - 6, across + 6, down + 6))
    for point in sorted((point for point in points if point.name), key=lambda point: point not in best):
        _label(pen, point.name, (x.at(point.cost), y.at(point.quality.value)), font, taken)
    with atomic_path(path) as temporary:
        canvas.save(temporary)


def faded_front() -> Colour:
    """The front's colour for its line."""
    return (150, 190, 216)


def number(value: float) -> str:
    """A tick's label."""
    return f"{value:.10g}" if abs(value) < 1e4 else f"{value:.3g}"


def _frame(pen: ImageDraw.ImageDraw, x: Axis, y: Axis, cost: str, font: ImageFont.FreeTypeFont) -> None:
    right = _SIZE[0] - _RIGHT
    for tick in y.ticks():
        pen.line((_LEFT, y.at(tick), right, y.at(tick)), LINE)
        text = number(tick)
        pen.text((_LEFT - 8 - font.getlength(text), y.at(tick) - 8), text, TEXT, font)
    for tick in x.ticks():
        pen.line((x.at(tick), y.start, x.at(tick), y.start + 5), BEATEN)
        text = number(tick)
        pen.text((x.at(tick) - font.getlength(text) / 2, y.start + 8), text, TEXT, font)
    pen.line((_LEFT, y.start, right, y.start), BEATEN)
    pen.text(((_LEFT + right - font.getlength(cost)) / 2, y.start + 32), cost, TEXT, font)


def _label(
    pen: ImageDraw.ImageDraw, name: str, at: tuple[float, float], font: ImageFont.FreeTypeFont, taken: list[Box]
) -> None:
    """Beside the point where there is room; the last place tried where there is none."""
    width, height = font.getlength(name), 15
    x, y = at
    places = [(x + 10, y - 9), (x - 10 - width, y - 9)]
    places += [(x + side, y + down) for down in (-24, 10, -40, 26, -56, 42, -72, 58) for side in (6, -width - 6)]
    box: Box = (0, 0, 0, 0)
    for left, top in places:
        box = (left, top, left + width, top + height)
        inside = left > _LEFT and left + width < _SIZE[0] - 4 and top > _TOP - 20 and top + height < _SIZE[1] - _BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            break
    taken.append(box)
    pen.text(box[:2], name, TEXT, font)


def _overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
