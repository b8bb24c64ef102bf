"""Contact sheets: many images with their captions in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from ..errors import UsageError
from .drawing import (
    BACKGROUND,
    MARGIN,
    Grid,
    Pixels,
    check_captions,
    check_pixels,
    enlarge,
    load_font,
    one_line,
    write_line,
)

_CELL = 96
_WIDEST_MARGIN = 320


def contact_sheet(
    images: Pixels,
    captions: Sequence[str],
    columns: int,
    title: str | None = None,
    margin: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """A labelled grid of images; small ones are enlarged by a whole factor, so that pixels stay square and sharp.

    Args:
        images: uint8 [N, H, W, 3], N at least 1.
        captions: N lines, each cut to the width of its cell.
        columns: cells of a row; fewer where N is smaller.
        margin: lines on the left of each row.

    Raises:
        UsageError: ``columns`` is not positive.
        ValueError: the images are not uint8 [N, H, W, 3], or there is not one caption for each.
    """
    check_pixels(images)
    check_captions(captions, len(images))
    if columns < 1:
        raise UsageError(f"columns must be at least 1, not {columns}")
    factor = math.ceil(_CELL / min(images.shape[1:3]))
    grid = Grid.of(images, captions, min(columns, len(images)), factor)
    heading = load_font(grid.font_size + 4)
    top = MARGIN
    width = grid.width
    if title:
        top += round(heading.size) + 14
        # A sheet of one narrow column grows a little for its title.
        width = max(width, min(math.ceil(heading.getlength(one_line(title))), 480))
    font = load_font(grid.font_size + 1)
    widest = max((font.getlength(one_line(line)) for lines in margin for line in lines), default=0.0)
    left = MARGIN + (min(math.ceil(widest), _WIDEST_MARGIN) + MARGIN if margin else 0)
    canvas = Image.new("RGB", (left + width + MARGIN, top + grid.height + MARGIN), BACKGROUND)
    if title:
        write_line(canvas, (MARGIN, MARGIN - 2), title, heading, width)
    for row, lines in enumerate(margin):
        for index, line in enumerate(lines):
            y = top + row * grid.row_height + index * (grid.font_size + 6)
            write_line(canvas, (MARGIN, y), line, font, _WIDEST_MARGIN)
    grid.draw(canvas, (left, top), [enlarge(image, factor) for image in images], captions)
    return canvas
