"""Drawing primitives for contact sheets and traces: a grid of cells, lines of text, whole-factor enlargement.

Knows pixels and fonts, not what the cells mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

BACKGROUND: Colour = (248, 248, 246)
TEXT: Colour = (38, 40, 46)
MARGIN = 16
GAP = 10

_FRAME: Colour = (206, 206, 202)
#: Longer text never fits a cell; it is cut before it is measured.
_LONGEST_TEXT = 400


@dataclass(frozen=True)
class Grid:
    """Cells with captions under them; sizes in pixels.

    Attributes:
        cell: (width, height) of an enlarged image.
        font_size: of the captions, from the width of a cell.
        caption_height: 0 without captions.
    """

    columns: int
    rows: int
    cell: tuple[int, int]
    font_size: int
    caption_height: int

    @classmethod
    def of(cls, images: Pixels, captions: Sequence[str], columns: int, factor: int) -> Grid:
        """The grid of images [N, H, W, 3] that are enlarged by ``factor``."""
        cell = (images.shape[2] * factor, images.shape[1] * factor)
        font_size = max(12, min(16, cell[0] // 11))
        caption_height = font_size + 10 if any(captions) else 0
        return cls(columns, -(-len(images) // columns), cell, font_size, caption_height)

    @property
    def width(self) -> int:
        """Of all cells and the gaps between them."""
        return self.columns * (self.cell[0] + GAP) - GAP

    @property
    def row_height(self) -> int:
        """From one row to the next."""
        return self.cell[1] + self.caption_height + GAP

    @property
    def height(self) -> int:
        """Of all cells, their captions and the gaps between them."""
        return self.rows * self.row_height - GAP

    def draw(
        self, canvas: Image.Image, origin: tuple[int, int], cells: Sequence[Image.Image], captions: Sequence[str]
    ) -> None:
        """Pastes the cells with their captions; ``origin`` is the left upper corner of the first."""
        pen, font = ImageDraw.Draw(canvas), load_font(self.font_size)
        for index, cell in enumerate(cells):
            row, column = divmod(index, self.columns)
            left = origin[0] + column * (self.cell[0] + GAP)
            top = origin[1] + row * self.row_height
            # A hairline around the cell, outside of it: images may be as light as the background.
            pen.rectangle((left - 1, top - 1, left + self.cell[0], top + self.cell[1]), outline=_FRAME)
            canvas.paste(cell, (left, top))
            if index < len(captions):
                write_line(canvas, (left, top + self.cell[1] + 3), captions[index], font, self.cell[0])


def write_line(canvas: Image.Image, corner: tuple[int, int], text: str, font: FreeTypeFont, width: int) -> None:
    """Draws one line of text, cut to ``width`` pixels."""
    ImageDraw.Draw(canvas).text(corner, fitted(text, font, width), fill=TEXT, font=font)


def fitted(text: str, font: FreeTypeFont, width: int) -> str:
    """One line, shortened with an ellipsis where it is wider than ``width`` pixels."""
    text = one_line(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1].rstrip()
    return text + "…"


def one_line(text: str) -> str:
    """The text without line breaks and runs of blanks; the font's narrow blank is doubled around a middle dot."""
    return " ".join(text[:_LONGEST_TEXT].split()).replace(" · ", "  ·  ")


def load_font(size: int) -> FreeTypeFont:
    """Pillow's own scalable font, so that pictures look the same on every machine."""
    font = ImageFont.load_default(size)
    # Pillow raises ImportError itself where it was built without FreeType; this is for the type checker.
    assert isinstance(font, FreeTypeFont)
    return font


def enlarge(image: Pixels, factor: int) -> Image.Image:
    """An image [H, W, 3] with every pixel a square of ``factor``."""
    return Image.fromarray(np.ascontiguousarray(image.repeat(factor, axis=0).repeat(factor, axis=1)))


def faded(colour: Colour) -> Colour:
    """The colour at a quarter of its strength on the background."""
    red, green, blue = ((channel + 3 * paper) // 4 for channel, paper in zip(colour, BACKGROUND, strict=True))
    return red, green, blue


def shared_palette(image: Image.Image, exact: Sequence[Colour]) -> Image.Image:
    """A palette for all frames of an animation: the colours of marks, also faded, and an image's most useful ones."""
    # One of the 256 entries stays free: the GIF writer marks with it what does not change from frame to frame.
    fixed = [BACKGROUND, TEXT, *exact, *map(faded, exact)]
    adaptive = image.quantize(255 - len(fixed), dither=Image.Dither.NONE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([channel for colour in fixed for channel in colour] + adaptive)
    return palette


def indexed_by(palette: Image.Image, image: Image.Image) -> Image.Image:
    """The image in the colours of a palette, without dithering: that would sparkle from frame to frame."""
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def check_pixels(images: Pixels) -> None:
    """ValueError unless they are uint8 [N, H, W, 3]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}")


def check_captions(captions: Sequence[str], count: int) -> None:
    """ValueError unless there is one for each image."""
    if len(captions) != count:
        raise ValueError(f"{len(captions)} captions for {count} images")
