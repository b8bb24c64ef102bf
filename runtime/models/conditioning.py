"""What one image is asked to be: requests, and the conditioner that knows what they mean.

A request is a class, a prompt, or nothing; only its family's conditioner looks inside, all others pass requests and the
named arrays made of them on. What a bundle must know about requests, class names for example, are the conditioner's
fields, and so the manifest's ``conditioning`` section.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from .graphs import TensorSpec

Request = Any
"""What one image is asked to be; opaque to all but its conditioner."""

Arrays = dict[str, NDArray[Any]]
"""Name of a graph's input to its values."""


class RequestOption(NamedTuple):
    """The option of ``gtr-run generate`` that takes requests."""

    option: str
    help: str


class Conditioner(Struct, frozen=True, forbid_unknown_fields=True):
    """Owns what a request is.

    Class attributes:
        inputs: the conditioning inputs of the family's graphs. Their first axis is G, the guidance branches: entry 0 is
            the request itself, entry 1 the unconditional branch.
        option: how a person asks on the command line; None where there is nothing to ask.
    """

    inputs: ClassVar[tuple[TensorSpec, ...]] = ()
    option: ClassVar[RequestOption | None] = None

    @abstractmethod
    def check_architecture(self, architecture: Any) -> None:
        """ValueError unless these requests are of this model."""

    @abstractmethod
    def parse(self, text: str) -> list[Request]:
        """Requests from what a person typed for :attr:`option`; at least one.

        Raises:
            UsageError: an item cannot be understood.
        """

    @abstractmethod
    def checked(self, request: Any) -> Request:
        """A request that came from Python.

        Raises:
            UsageError: it is none.
        """

    @abstractmethod
    def caption(self, request: Request) -> str:
        """A few words for sheets and traces."""

    @abstractmethod
    def stem(self, request: Request) -> str:
        """The part of a picture's file name, or its folder, that tells requests apart and sorts them."""

    @abstractmethod
    def record(self, request: Request) -> dict[str, Any]:
        """What a PNG's settings and JSON say of it; plain values."""

    @abstractmethod
    def recalled(self, record: Mapping[str, Any]) -> Request:
        """The request of which :meth:`record` said this, among other keys.

        Raises:
            UsageError: something is missing or wrong; one line without the file's name.
        """

    @abstractmethod
    def samples(self, count: int, spread: bool = False) -> list[Request]:
        """``count`` requests for bench, verify, calibration and evaluation: one after the other, then again.

        Args:
            spread: fewer than there are go over the whole range instead of its beginning.
        """

    @abstractmethod
    def arrays(self, requests: Sequence[Request]) -> Arrays:
        """The graphs' conditioning inputs [2, B, ...]; entry 1 of the first axis is the unconditional branch."""

    @abstractmethod
    def example(self, rng: np.random.Generator, sizes: Mapping[str, int]) -> Arrays:
        """Inputs of the given axis sizes, as a generation could give them, for verification."""

    @abstractmethod
    def stored(self, requests: Sequence[Request]) -> Arrays:
        """For ``--save-latents``: arrays that say what the images are."""

    @abstractmethod
    def restored(self, arrays: Mapping[str, NDArray[Any]], count: int) -> list[Request]:
        """What :meth:`stored` wrote, for ``count`` images.

        Raises:
            UsageError: something is missing or wrong; one line without the file's name.
        """

    @property
    @abstractmethod
    def summary(self) -> str:
        """For ``gtr-export inspect``."""
