"""PNG files that remember their settings."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import GtrError
from ..files import atomic_path
from .drawing import Pixels, check_pixels

SETTINGS_KEY = "gtr-deploy"
"""The PNG text chunk that holds the settings as JSON."""


_BEGIN, _END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


def save_png(path: Path, image: Pixels, settings: Mapping[str, Any]) -> None:
    """Writes an image uint8 [H, W, 3] as a PNG whose text chunk :data:`SETTINGS_KEY` says how it was made; what JSON
    can hold, also NumPy numbers and arrays, and paths. The old file stays if that fails.

    Raises:
        GtrError: the file cannot be written.
        ValueError: the image is not uint8 [H, W, 3], or a setting is not finite.
        TypeError: a setting is of a type that JSON has no place for.
    """
    check_pixels(image[None])
    text = json.dumps(dict(settings), default=_plain, allow_nan=False)
    metadata = PngInfo()
    metadata.add_text(SETTINGS_KEY, text)
    encoded = io.BytesIO()  # first, so that the size is known before a byte is written
    Image.fromarray(np.ascontiguousarray(image)).save(encoded, format="PNG", pnginfo=metadata)
    write_picture(path, lambda file: file.write_bytes(encoded.getbuffer()), encoded.tell())


def is_whole(path: Path) -> bool:
    """Whether a file is there that begins and ends as a PNG does; one that was cut off while it was copied does not."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_BEGIN))
            file.seek(-len(_END), os.SEEK_END)
            return begin == _BEGIN and file.read() == _END
    except OSError:
        return False


def read_pixels(path: Path) -> Pixels:
    """The picture as uint8 [H, W, 3].

    Raises:
        GtrError: see :func:`read_settings`.
    """
    with _opened(path) as picture:
        return np.asarray(picture.convert("RGB"))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that :func:`save_png` wrote.

    Raises:
        GtrError: the file cannot be read, is not a PNG, or holds no settings; one line.
    """
    with _opened(path) as picture:
        text = picture.info.get(SETTINGS_KEY)
        if text is None:
            # Other programs move text behind the pixels, where it is seen only once these are read.
            picture.load()
            text = picture.info.get(SETTINGS_KEY)
    if text is None:
        raise GtrError(f'{path} holds no settings (text chunk "{SETTINGS_KEY}"); was it written by another program?')
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GtrError(f"{path}: the settings in it are not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise GtrError(f"{path}: the settings in it are not a JSON object")
    return settings


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture, its header read; GtrError for whatever is wrong with it, also inside of the block."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns of a picture whose pixels would take up to half a gigabyte.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as picture:
                yield picture
    except Image.UnidentifiedImageError:
        raise GtrError(f"{path} is not a PNG file") from None
    except OSError as error:
        raise GtrError(f"cannot read {path}: {error.strerror or error}") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise GtrError(f"{path} is a damaged PNG file: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"settings cannot hold a {type(value).__name__}")


def write_picture(path: Path, save: Callable[[Path], Any], size: int | None = None) -> None:
    """Writes a file of ``size`` bytes, if known, beside ``path`` and renames it; GtrError if it cannot be written."""
    try:
        with atomic_path(path, size) as temporary:
            save(temporary)
    except OSError as error:
        raise GtrError(f"cannot write {path}: {error.strerror or error}") from None
