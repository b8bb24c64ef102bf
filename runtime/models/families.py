"""The table of model families. Nothing outside a family asks which one it is: it looks here for what it needs."""

from __future__ import annotations

import msgspec

from .architecture import Architecture
from .conditioning import Conditioner
from .family import Family, KnownModel
from .graphs import GraphSpec
from .mar import MAR, UNCONDITIONAL

FAMILIES: dict[str, Family] = {"mar": MAR, "mar-unconditional": UNCONDITIONAL}
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


def decode_model(model: msgspec.Raw, conditioning: msgspec.Raw) -> tuple[Architecture, Conditioner]:
    """Sizes and conditioner from a manifest's two sections, read strictly.

    Raises:
        ValueError: an unknown family, anything missing, unknown, of another type or out of range.
    """
    try:
        name = msgspec.json.decode(model, type=_Tagged).family
        if name not in FAMILIES:
            raise ValueError(f"family {name[:40]!r} is not one of {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        architecture = msgspec.json.decode(model, type=family.architecture)
        conditioner = msgspec.json.decode(conditioning, type=family.conditioner)
    except msgspec.ValidationError as error:  # no ValueError before msgspec 0.21
        raise ValueError(str(error)) from None
    conditioner.check_architecture(architecture)
    return architecture, conditioner


class _Tagged(msgspec.Struct):
    family: str
