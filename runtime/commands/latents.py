"""The NPZ of --save-latents, written batch by batch. Knows nothing of what the latents are."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import atomic_path


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
