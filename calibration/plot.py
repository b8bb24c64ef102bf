"""The sensitivity table as a picture: one bar per layer, worst on top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..runtime.errors import UsageError
from ..runtime.files import atomic_path
from ..runtime.pictures.drawing import BACKGROUND, MARGIN, TEXT, Colour, fitted, load_font

_BAR: Colour = (86, 132, 190)
_KEPT: Colour = (210, 120, 84)
_LINE: Colour = (206, 206, 202)
_ROW, _NAMES, _BARS, _FONT = 20, 320, 460, 13


def plot_bars(path: Path, title: str, bars: Sequence[tuple[str, float]], kept: Sequence[str] = ()) -> None:
    """Writes a PNG of horizontal bars on a logarithmic axis.

    Args:
        path: ends in .png.
        title: one line.
        bars: (name, value above 0), in the order to show; values of 0 get no bar.
        kept: names drawn in another colour.

    Raises:
        UsageError: another suffix.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path} does not end in .png")
    font, top = load_font(_FONT), 2 * MARGIN + 2 * _ROW
    size = (_NAMES + _BARS + 90 + 2 * MARGIN, top + _ROW * len(bars) + MARGIN)
    canvas = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN), fitted(title, load_font(_FONT + 2), size[0] - 2 * MARGIN), TEXT, load_font(_FONT + 2))
    positive = [value for _, value in bars if value > 0 and math.isfinite(value)]
    low = math.floor(math.log10(min(positive))) if positive else -1
    high = max(math.ceil(math.log10(max(positive))), low + 1) if positive else 0
    left = MARGIN + _NAMES
    for decade in range(low, high + 1):
        x = left + round(_BARS * (decade - low) / (high - low))
        pen.line((x, top - 4, x, size[1] - MARGIN), _LINE)
        pen.text((x - 12, top - _ROW - 2), f"{10.0**decade:g}", TEXT, font)
    for row, (name, value) in enumerate(bars):
        y = top + row * _ROW
        pen.text((MARGIN, y), fitted(name, font, _NAMES - 12), TEXT, font)
        share = 1.0 if math.isinf(value) else 0.0
        if 0 < value < math.inf:
            share = (math.log10(value) - low) / (high - low)
        end = left + max(1, round(_BARS * share))
        pen.rectangle((left, y + 3, end, y + _ROW - 5), _KEPT if name in kept else _BAR)
        pen.text((end + 6, y), f"{value:.2g}", TEXT, font)
    with atomic_path(path) as temporary:
        canvas.save(temporary)
