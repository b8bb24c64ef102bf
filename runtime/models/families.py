"""The table of model families. Nothing outside a family asks which one it is: it looks here for what it needs."""

from __future__ import annotations

from typing import Any

import msgspec

from .architecture import Architecture
from .conditioning import Conditioner
from .family import Family, KnownModel
from .graphs import GraphSpec
from .mar import MAR

FAMILIES: dict[str, Family] = {"mar": MAR}
"""Family name, the tag of its architecture, to its description. The torch side is export/families.py."""


def family_of(architecture: Architecture) -> Family:
    """The family that a model is of."""
    return FAMILIES[architecture.family]


def graph_specs(architecture: Architecture, max_batch: int = 8) -> dict[str, GraphSpec]:
    """The graphs of a model, by kind: the networks in the order they run, then the row graphs."""
    return family_of(architecture).graph_specs(architecture, max_batch)


def known_models() -> dict[str, KnownModel]:
    """Every model that this project knows by name."""
    return {name: model for family in FAMILIES.values() for name, model in family.models.items()}


def decode_model(model: Any, conditioning: Any) -> tuple[Architecture, Conditioner]:
    """Sizes and conditioner from a manifest's two sections, read strictly.

    Args:
        model: plain JSON values; ``family`` decides how they are read.
        conditioning: plain JSON values.

    Raises:
        ValueError: an unknown family, anything missing, unknown, of another type or out of range. Paths in the message
            begin with ``$``, the section.
    """
    name = model.get("family") if isinstance(model, dict) else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"family {str(name)[:40]!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    architecture = msgspec.convert(model, family.architecture)
    conditioner = msgspec.convert(conditioning, family.conditioner)
    conditioner.check_architecture(architecture)
    return architecture, conditioner
