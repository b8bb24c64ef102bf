"""Tokens to pixels: through a KL autoencoder's decoder, or as the squares of pixels that they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...runtime.models.architecture import Architecture
from .kl_decoder import KL16_LAYOUT, KlDecoder, KlLayout, layout_of


class LatentDecoder(KlDecoder):
    """Latents [B, L, C] -> RGB uint8 [B, H, W, 3]."""

    def __init__(self, architecture: Architecture, layout: KlLayout) -> None:
        super().__init__(layout)
        self.grid, self.patch = architecture.grid, architecture.decoder.patch
        self.scale, self.shift = architecture.decoder.scale, architecture.decoder.shift

    def image(self, latents: Tensor) -> Tensor:
        """The decoded image [B, 3, H, W], about -1..1, before clipping."""
        cells = unpatched(latents, self.grid, self.patch) / self.scale
        return super().forward(cells + self.shift if self.shift else cells)

    def forward(self, latents: Tensor) -> Tensor:
        return to_pixels(self.image(latents))


class PatchDecoder(nn.Module):
    """A token is a square of grey or RGB pixels in -1..1. Latents [B, L, C] -> RGB uint8 [B, H, W, 3]."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.grid, self.patch = architecture.grid, architecture.decoder.patch

    def forward(self, latents: Tensor) -> Tensor:
        return to_pixels(unpatched(latents, self.grid, self.patch).expand(-1, 3, -1, -1))


def unpatched(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Tokens [B, L, C p p] -> cells [B, C, h p, w p]: a token is p x p cells, of each channel row by row
    (``unpatchify`` of models/mar.py: 'nhwcpq->nchpwq')."""
    rows, columns = grid
    cells = tokens.reshape(-1, rows, columns, tokens.shape[-1] // patch**2, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(-1, cells.shape[1], rows * patch, columns * patch)


def to_pixels(image: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 -> uint8 [B, H, W, 3], round(clip((image + 1) / 2 * 255, 0, 255)) (engine_mar.py). Comes
    last: TensorRT has uint8 for inputs and outputs only."""
    return torch.round(torch.clamp((image.permute(0, 2, 3, 1) + 1) / 2 * 255, 0, 255)).to(torch.uint8)


def build_decoder(architecture: Architecture, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The decoder module of a model, without weights loaded.

    Args:
        weights: of a VAE's decoder, whose shapes say what it is made of; KL-16's levels by default.
    """
    if architecture.decoder.kind == "patches":
        return PatchDecoder(architecture)
    channels = architecture.cell_channels
    layout = replace(KL16_LAYOUT, latent_channels=channels, inner_channels=channels)
    return LatentDecoder(architecture, layout_of(weights, architecture.decoder.groups) if weights else layout)
