"""What a model family is, in one declarative description. Knows no family; they stand in families.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture
from .conditioning import Conditioner
from .graphs import GraphSpec


@dataclass(frozen=True)
class KnownModel:
    """A model that goes by a name; ``plan_defaults`` has keys of ``sampling.plan.MODEL_DEFAULTS``."""

    architecture: Architecture
    conditioner: Conditioner
    plan_defaults: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Everything that the runtime knows of one model family.

    Attributes:
        architecture: type of its sizes; its tag is the family's name.
        conditioner: type of what its models can be asked for.
        graph_specs: (architecture, max_batch) to the graphs, by kind, in the order they run.
        presets: plan name to settings (``sampling.plan.PlanSettings``); the first is the original's own, which others
            are compared with.
        backbone_flops: (architecture, known, predicted, context, branches) to the FLOPs of one call per image.
        head_flops: (architecture, branches) to the FLOPs of one token's reverse step.
        parameters: architecture to the number of weights, decoder left out.
        models: the models that are known by name.
    """

    architecture: type[Architecture]
    conditioner: type[Conditioner]
    graph_specs: Callable[[Any, int], dict[str, GraphSpec]]
    presets: Mapping[str, Mapping[str, Any]]
    backbone_flops: Callable[[Any, int, int, int, int], int]
    head_flops: Callable[[Any, int], int]
    parameters: Callable[[Any], int]
    models: Mapping[str, KnownModel]
