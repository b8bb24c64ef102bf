"""Latents in NPZ files: all of a run in one, written batch by batch; or those of one image with its settings, in place
of a picture. Knows nothing of what the latents are."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GtrError
from ..files import atomic_path
from ..pictures.png import write_picture

SETTINGS = "settings.json"
"""The member of an image's NPZ that says how it was made."""

_LONGEST_SETTINGS = 1 << 20


@contextmanager
def latents_file(
    path: Path, shape: tuple[int, ...], others: Mapping[str, NDArray[Any]]
) -> Iterator[Callable[[NDArray[np.float32]], None]]:
    """Yields a function that takes the next latents float32 [b, L, C]; the file is there once the block has ended
    without an error, as NumPy's ``savez`` writes it.

    Args:
        shape: [n, L, C] of all latents together.
        others: further arrays, by name.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo("latents.npy"), "w", force_zip64=True) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)

            def add(latents: NDArray[np.float32]) -> None:
                file.write(np.ascontiguousarray(latents, "<f4").tobytes())

            yield add
        for name, array in others.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def save_latents(path: Path, latents: NDArray[np.float32], settings: Mapping[str, Any]) -> None:
    """Writes the latents [L, C] of one image, as ``numpy.load(path)["latents"]`` reads them. The old file stays if that
    fails.

    Raises:
        GtrError: the file cannot be written.
    """
    encoded = io.BytesIO()
    with zipfile.ZipFile(encoded, "w") as archive:
        with archive.open(zipfile.ZipInfo("latents.npy"), "w") as file:
            np.lib.format.write_array(file, np.ascontiguousarray(latents, "<f4"), allow_pickle=False)
        archive.writestr(zipfile.ZipInfo(SETTINGS), json.dumps(dict(settings), allow_nan=False))
    write_picture(path, lambda file: file.write_bytes(encoded.getbuffer()), encoded.tell())


def has_latents(path: Path) -> bool:
    """Whether a file is there that ends as :func:`save_latents` ends one; one that was cut off does not."""
    return path.is_file() and zipfile.is_zipfile(path)


def read_latents_settings(path: Path) -> dict[str, Any]:
    """The settings that :func:`save_latents` wrote.

    Raises:
        GtrError: the file cannot be read, or holds none.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(SETTINGS) as file:
            settings = json.loads(file.read(_LONGEST_SETTINGS))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        raise GtrError(f"{path} holds no settings ({type(error).__name__}); another program's file?") from None
    if not isinstance(settings, dict):
        raise GtrError(f"{path}: the settings in it are not a JSON object")
    return settings
