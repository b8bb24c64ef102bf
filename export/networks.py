"""The torch modules of a model with their weights, one per graph: exported, and what parity is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ..runtime.models.architecture import Architecture
from .families import export_family
from .graphs.decoders import build_decoder
from .graphs.detail_score import DetailScore
from .graphs.layers import set_precision
from .graphs.rows import ROW_MODULES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Networks:
    """The modules of one model, one per graph; no decoder where the model has none."""

    backbone: nn.Module
    modulation: nn.Module
    diffusion_step: nn.Module
    detail_score: nn.Module
    decoder: nn.Module | None = None


def build_graph_module(
    kind: str,
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    precision: str = "fp32",
) -> nn.Module:
    """The module of one graph with its weights, in ``precision``; evaluation mode, no gradients.

    Args:
        kind: a key of ``graphs.graph_specs``.
        weights: MAR state dict in the official layout (already checked, see checkpoints.py).
        vae: VAE decoder state dict (vae.py); empty for mar-digits.
    """
    family = export_family(architecture)
    if kind in family.networks:
        row = family.networks[kind]
        module = row.graph(_loaded(lambda: row.build(architecture), weights, row.prefix))
    elif kind == "detail_score":
        module = DetailScore(architecture)
    elif kind in ROW_MODULES:
        module = ROW_MODULES[kind]()
    else:
        module = _loaded(lambda: build_decoder(architecture, vae), vae)
    set_precision(module, DTYPES[precision])
    return module.eval().requires_grad_(False)


def _loaded(build, weights: Mapping[str, Tensor], prefix: str = ""):
    """Builds without allocating random weights, then takes its own tensors as they are (float32)."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict(
        {key: weights[prefix + key].float() for key in module.state_dict()}, assign=True, strict=True
    )
    return module


def build_networks(
    architecture: Architecture, weights: Mapping[str, Tensor], vae: Mapping[str, Tensor], precision: str = "fp32"
) -> Networks:
    """All of them."""
    names = (field.name for field in fields(Networks))
    kinds = [name for name in names if name != "decoder" or architecture.decoder.makes_pictures]
    return Networks(*(build_graph_module(kind, architecture, weights, vae, precision) for kind in kinds))
