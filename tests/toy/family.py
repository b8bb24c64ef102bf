"""A second family, on the runtime's side: unconditional MAR. There is nothing to ask for, and one input fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gtr_deploy.runtime.errors import UsageError
from gtr_deploy.runtime.models.architecture import Architecture, Decoder
from gtr_deploy.runtime.models.conditioning import Arrays, Conditioner
from gtr_deploy.runtime.models.family import Family, KnownModel
from gtr_deploy.runtime.models.flops import block_flops, head_flops
from gtr_deploy.runtime.models.graphs import masked_generator_specs


class ToyArchitecture(Architecture, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="toy"):
    """No classes; the buffer holds copies of one learned vector."""

    depth: int
    heads: int
    buffer: int


class NothingAsked(Conditioner, frozen=True, forbid_unknown_fields=True):
    """Every request is None."""

    def check_architecture(self, architecture: Any) -> None:
        """Fits every model."""

    def parse(self, text: str) -> list[None]:
        raise UsageError(f"there is nothing to ask for, and {text!r} was asked")

    def checked(self, request: Any) -> None:
        if request is not None:
            raise UsageError(f"there is nothing to ask for, and {request!r} was asked")

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


def backbone_flops(architecture: ToyArchitecture, known: int, predicted: int, context: int, branches: int) -> int:
    """FLOPs of one backbone call per image."""
    seen = architecture.buffer + known
    return sum(architecture.depth * block_flops(n, architecture.width) for n in (seen, seen + predicted + context))


TOY_MODEL = KnownModel(
    ToyArchitecture(
        name="toy",
        grid=(4, 6),
        token_channels=9,
        width=32,
        depth=2,
        heads=4,
        buffer=0,
        head_depth=2,
        head_width=40,
        decoder=Decoder(kind="patches", stride=1, patch=3),
    ),
    NothingAsked(),
    {"cfg": 1.0, "max_timestep": 950},
)

TOY = Family(
    architecture=ToyArchitecture,
    conditioner=NothingAsked,
    graph_specs=lambda architecture, max_batch: masked_generator_specs(architecture, max_batch, ()),
    presets={"slow": {"stage_steps": (12,), "order": "random", "fts": "none"}, "gtr": {"stage_steps": (4, 2, 1)}},
    backbone_flops=backbone_flops,
    head_flops=head_flops,
    parameters=lambda architecture: 24 * architecture.depth * architecture.width**2,
    models={"toy": TOY_MODEL},
)
