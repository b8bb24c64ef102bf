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


def contact_sheet(images: Pixels, captions: Sequence[str], columns: int, title: str | None = None) -> Image.Image:
    """A labelled grid of images; small ones are enlarged by a whole factor, so that pixels stay square and sharp.

    Args:
        images: uint8 [N, H, W, 3], N at least 1.
        captions: N lines, each cut to the width of its cell.
        columns: cells of a row; fewer where N is smaller.

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
    canvas = Image.new("RGB", (width + 2 * MARGIN, top + grid.height + MARGIN), BACKGROUND)
    if title:
        write_line(canvas, (MARGIN, MARGIN - 2), title, heading, width)
    grid.draw(canvas, (MARGIN, top), [enlarge(image, factor) for image in images], captions)
    return canvas
