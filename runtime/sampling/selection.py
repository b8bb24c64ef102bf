"""Which tokens get extra diffusion steps in the reconstruction stage: FTS and the rules it is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError
from .noise import selection_priorities

FTS_RULES = ("fts", "norm", "random", "lowest", "none", "all")
SCORED_RULES = ("fts", "norm", "lowest")
"""Rules that need the detail score graph."""


def detail_basis(width: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine tables [D, H] and weights [H] of the FTS score, H = floor(D/2) [paper].

    s = sum_{n=1}^{H} |FFT(z)(n)| * (1 + n / H), the 1-D DFT along the D channels of a condition vector z.
    """
    half = width // 2
    frequency = np.arange(1, half + 1)
    # (channel * n) mod D keeps the angle small, so that the table is exact to float32.
    angle = 2 * np.pi * (np.outer(np.arange(width), frequency) % width) / width
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32), (1 + frequency / half).astype(np.float32)


def refined_count(rule: str, fraction: float, predicted: int) -> int:
    """How many of ``predicted`` tokens are selected: max(1, floor(fraction * n)) [ours]; 0 or all for none and all."""
    if rule not in FTS_RULES:
        raise PlanError(f"FTS rule {rule!r} is not one of {', '.join(FTS_RULES)}")
    if rule == "none":
        return 0
    if rule == "all":
        return predicted
    # The small term keeps a product such as 0.1 * 30 from falling to 2.999...
    return min(predicted, max(1, int(fraction * predicted + 1e-9)))


def select(
    rule: str,
    count: int,
    positions: NDArray[np.int64],
    seeds: Sequence[int],
    tokens: int,
    score: NDArray[np.float32] | None = None,
    norm: NDArray[np.float32] | None = None,
) -> NDArray[np.bool_]:
    """Marks ``count`` tokens per image.

    Args:
        rule: one of ``FTS_RULES``: highest score (fts), lowest score, largest ||z|| (norm), random per image seed.
        positions: int64 [B, P], the tokens to choose among; ties go to the smaller position.
        seeds: one per image, used by ``random``.
        tokens: L, tokens of an image.
        score, norm: float32 [B, P], where the rule needs them.

    Returns:
        bool [B, P].
    """
    chosen = np.zeros(positions.shape, dtype=bool)
    if count == 0:
        return chosen
    if count >= positions.shape[1]:
        return ~chosen
    for image, places in enumerate(positions):
        if rule == "random":
            key = selection_priorities(seeds[image], tokens)[places]
        else:
            values = norm if rule == "norm" else score
            if values is None:
                raise PlanError(f"FTS rule {rule!r} needs the detail score graph")
            key = values[image] if rule == "lowest" else -values[image]
        chosen[image, np.lexsort((places, key))[:count]] = True
    return chosen
