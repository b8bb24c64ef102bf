"""The torch backend: same interface as runtime/backends, plain and slow; parity is measured against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..runtime.architecture import Architecture
from ..runtime.backends.base import Condition, DiffusionChain, Floats, Integers
from .checkpoints import HEAD_PREFIX
from .models.backbone import Backbone
from .models.decoders import build_decoder
from .models.detail_score import DetailScore
from .models.diffusion_head import DiffusionHead, DiffusionStep
from .models.layers import set_precision

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Networks:
    """The four modules of one model, one per graph."""

    backbone: nn.Module
    diffusion_step: nn.Module
    detail_score: nn.Module
    decoder: nn.Module


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
        vae: VAE decoder state dict; empty for mar-digits.
    """
    if kind == "backbone":
        part = {key: value for key, value in weights.items() if not key.startswith(HEAD_PREFIX)}
        module: nn.Module = _loaded(lambda: Backbone(architecture), part)
    elif kind == "diffusion_step":
        part = {key[len(HEAD_PREFIX) :]: value for key, value in weights.items() if key.startswith(HEAD_PREFIX)}
        module = DiffusionStep(_loaded(lambda: DiffusionHead(architecture), part))
    elif kind == "detail_score":
        module = DetailScore(architecture)
    else:
        module = _loaded(lambda: build_decoder(architecture), vae)
    set_precision(module, DTYPES[precision])
    return module.eval().requires_grad_(False)


def _loaded(build, weights: Mapping[str, Tensor]):
    """Builds without allocating random weights, then takes the given tensors as they are (float32)."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True, strict=True)
    return module


def build_networks(
    architecture: Architecture, weights: Mapping[str, Tensor], vae: Mapping[str, Tensor], precision: str = "fp32"
) -> Networks:
    """All four modules."""
    kinds = ("backbone", "diffusion_step", "detail_score", "decoder")
    return Networks(*(build_graph_module(kind, architecture, weights, vae, precision) for kind in kinds))


class TorchBackend:
    """Runs the modules themselves, eagerly, on the CPU."""

    name = "torch"

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    @torch.inference_mode()
    def condition(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, labels: Integers
    ) -> Condition:
        arguments = [torch.from_numpy(np.ascontiguousarray(a)) for a in (tokens, visible, predict, context, labels)]
        z = self._networks.backbone(*arguments)
        return Condition(tuple(z.shape), z)

    @torch.inference_mode()
    def detail(self, condition: Condition) -> tuple[Floats, Floats]:
        score, norm = self._networks.detail_score(condition.value[0])
        return score.numpy(), norm.numpy()

    @torch.inference_mode()
    def denoise(self, condition: Condition, chain: DiffusionChain) -> Floats:
        branches, batch, predicted, width = condition.shape
        z = condition.value.reshape(branches, batch * predicted, width)[:, torch.from_numpy(chain.rows)]
        x, guidance = torch.from_numpy(chain.x.copy()), torch.from_numpy(chain.guidance)
        for segment in chain.segments:
            n = segment.rows
            tables = zip(segment.timesteps, segment.coefficients, segment.noise, strict=True)
            for timestep, coefficients, noise in tables:
                x[:n] = self._networks.diffusion_step(
                    x[:n],
                    z[:, :n],
                    torch.from_numpy(timestep),
                    torch.from_numpy(coefficients),
                    guidance[:n],
                    torch.from_numpy(noise),
                )
        return x.numpy()

    @torch.inference_mode()
    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        return self._networks.decoder(torch.from_numpy(latents)).numpy()
