"""The requests of models that cannot be asked for anything: unconditional ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, printable
from .conditioning import Arrays, Conditioner

_NOTHING = "this model makes pictures of its own accord and takes no request"


class NothingAsked(Conditioner, frozen=True, forbid_unknown_fields=True):
    """Every request is None: the model makes what it was trained on."""

    def check_architecture(self, architecture: Any) -> None:
        """Fits every model."""

    def parse(self, text: str) -> list[None]:
        raise UsageError(f"{printable(text)!r}: {_NOTHING}")

    def checked(self, request: Any) -> None:
        if request is not None:
            raise UsageError(f"{printable(repr(request))}: {_NOTHING}")

    def caption(self, request: None) -> str:
        return "unconditional"

    def stem(self, request: None) -> str:
        return "unconditional"

    def record(self, request: None) -> dict[str, Any]:
        return {}

    def recalled(self, record: Mapping[str, Any]) -> None:
        return None

    def samples(self, count: int, spread: bool = False) -> list[None]:
        return [None] * count

    def arrays(self, requests: Sequence[None]) -> Arrays:
        return {}

    def example(self, rng: np.random.Generator, sizes: Mapping[str, int]) -> Arrays:
        return {}

    def stored(self, requests: Sequence[None]) -> Arrays:
        return {}

    def restored(self, arrays: Mapping[str, NDArray[Any]], count: int) -> list[None]:
        return [None] * count

    @property
    def summary(self) -> str:
        return "unconditional"
