"""What a backend does for the sampler. The sampler says what to run; a backend owns how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Condition:
    """Condition vectors z [G, B, P, D] where the backend keeps them; only that backend may look inside.

    Attributes:
        shape: (G, B, P, D).
        value: the backend's own handle.
    """

    shape: tuple[int, int, int, int]
    value: Any


@dataclass(frozen=True)
class ChainSegment:
    """Consecutive reverse steps over the same rows.

    Attributes:
        rows: n; the first n rows of the chain take part.
        timesteps: int64 [S, n].
        coefficients: float32 [S, n, K], see ``diffusion.COEFFICIENTS``.
        noise: float32 [S, n, C].
    """

    rows: int
    timesteps: Integers
    coefficients: Floats
    noise: Floats


@dataclass(frozen=True)
class DiffusionChain:
    """All reverse steps of one AR step. Rows are sorted by falling step count and end together, so that rows with 50
    and with 20 steps cost 50 calls, not 70.

    Attributes:
        rows: int64 [N], for each row of the chain its row in z seen as [G, B * P, D].
        x: float32 [N, C], x_T of each row.
        guidance: float32 [N].
        segments: in the order they run; row counts never fall.
    """

    rows: Integers
    x: Floats
    guidance: Floats
    segments: tuple[ChainSegment, ...]


class Backend(Protocol):
    """Runs the four graphs of one bundle."""

    name: str

    def condition(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, labels: Integers
    ) -> Condition:
        """The backbone; arguments as ``graphs.graph_specs`` has them. z stays with the backend."""
        ...

    def detail(self, condition: Condition) -> tuple[Floats, Floats]:
        """FTS score and ||z|| of the conditional branch, both [B, P]."""
        ...

    def denoise(self, condition: Condition, chain: DiffusionChain) -> Floats:
        """Runs a whole chain of reverse steps; x_0 [N, C] in the chain's row order."""
        ...

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        """Latents [B, L, C] to RGB [B, H, W, 3]."""
        ...
