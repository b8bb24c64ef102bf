"""The torch side of the table of model families (runtime/models/families.py): state dict and modules of each.

Imports torch; what must not is told a family by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..runtime.models.architecture import Architecture
from .graphs.backbone import Backbone, UnconditionalBackbone
from .graphs.diffusion_head import DiffusionHead, DiffusionStep, Modulation


@dataclass(frozen=True)
class NetworkModule:
    """One network with weights.

    Attributes:
        build: architecture to the module; its state dict is the checkpoint's, without the prefix.
        prefix: of its keys in the checkpoint.
        graph: the module to the one that is exported.
    """

    build: Callable[[Any], nn.Module]
    prefix: str = ""
    graph: Callable[[Any], nn.Module] = lambda module: module


@dataclass(frozen=True)
class ExportFamily:
    """What exporting knows of one model family: graph kind to its module, and the names that a checkpoint may have
    beside theirs, which nothing reads."""

    networks: Mapping[str, NetworkModule]
    unread: tuple[str, ...] = ()


_HEAD = {
    "modulation": NetworkModule(Modulation, "diffloss.net."),
    "diffusion_step": NetworkModule(DiffusionHead, "diffloss.net.", DiffusionStep),
}
MAR = ExportFamily({"backbone": NetworkModule(Backbone), **_HEAD})
UNCONDITIONAL = ExportFamily({"backbone": NetworkModule(UnconditionalBackbone), **_HEAD}, unread=("class_emb.weight",))

FAMILIES: dict[str, ExportFamily] = {"mar": MAR, "mar-unconditional": UNCONDITIONAL}
"""Family name to its torch side."""


def export_family(architecture: Architecture) -> ExportFamily:
    """The family that a model is of."""
    return FAMILIES[architecture.family]
