"""A second family, on the runtime's side: unconditional MAR. There is nothing to ask for, and one input fewer."""

from __future__ import annotations

from typing import Any

from gtr_deploy.runtime.errors import UsageError
from gtr_deploy.runtime.models.architecture import Architecture, Decoder
from gtr_deploy.runtime.models.family import Family, KnownModel
from gtr_deploy.runtime.models.flops import block_flops, head_flops
from gtr_deploy.runtime.models.graphs import masked_generator_specs
from gtr_deploy.runtime.models.nothing import NothingAsked


class ToyArchitecture(Architecture, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="toy"):
    """No classes; the buffer holds copies of one learned vector."""

    depth: int
    heads: int
    buffer: int


class NothingToAsk(NothingAsked, frozen=True, forbid_unknown_fields=True):
    """Every request is None, and says so in its own words."""

    def checked(self, request: Any) -> None:
        if request is not None:
            raise UsageError(f"there is nothing to ask for, and {request!r} was asked")


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
    NothingToAsk(),
    {"cfg": 1.0, "max_timestep": 950},
)

TOY = Family(
    architecture=ToyArchitecture,
    conditioner=NothingToAsk,
    graph_specs=lambda architecture, max_batch: masked_generator_specs(architecture, max_batch, ()),
    presets={"slow": {"stage_steps": (12,), "order": "random", "fts": "none"}, "gtr": {"stage_steps": (4, 2, 1)}},
    backbone_flops=backbone_flops,
    head_flops=head_flops,
    parameters=lambda architecture: 24 * architecture.depth * architecture.width**2,
    models={"toy": TOY_MODEL},
)
