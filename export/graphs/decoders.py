"""Latents to pixels: the KL-16 VAE decoder of latent diffusion, and mar-digits' patches.

The VAE is the decoder half of AutoencoderKL (models/vae.py of the original project), with its state dict's names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime.models.architecture import Architecture
from .layers import Conv2d


class GroupNorm(nn.GroupNorm):
    """32 groups, eps 1e-6, always in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float())


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus a shortcut; float32 residual stream."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(outputs)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x.float() + hidden.float()


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = Conv2d(channels, channels, 1)
        self.k = Conv2d(channels, channels, 1)
        self.v = Conv2d(channels, channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        normed = self.norm(x)
        query, key, value = (layer(normed).reshape(batch, channels, -1) for layer in (self.q, self.k, self.v))
        scores = torch.matmul(query.transpose(1, 2) * channels**-0.5, key)
        weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
        mixed = torch.matmul(value, weights.transpose(1, 2)).reshape(batch, channels, height, width)
        return x + self.proj_out(mixed).float()


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")).float()


class _Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(inputs if index == 0 else outputs, outputs) for index in range(3))
        if upsample:
            self.upsample = _Upsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class _Kl16Convolutions(nn.Module):
    """``decoder.*`` of the checkpoint: base width 128, multipliers (1, 1, 2, 2, 4)."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        widths = [128, 128, 256, 256, 512]
        self.conv_in = Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            _Level(inputs[level], outputs, upsample=level > 0) for level, outputs in enumerate(widths)
        )
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x).float())
        for level in range(len(self.up) - 1, -1, -1):
            x = self.up[level](x)
        return self.conv_out(F.silu(self.norm_out(x))).float()


class Kl16Decoder(nn.Module):
    """Latents [B, L, C] -> RGB uint8 [B, 16hp, 16wp, 3]: a token is p x p latent cells, of each channel row by row
    (``unpatchify`` of models/mar.py). Attribute names are the VAE checkpoint's keys."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.grid, self.patch = architecture.grid, architecture.decoder.patch
        self.channels = architecture.token_channels // self.patch**2
        self.scale, self.shift = architecture.decoder.scale, architecture.decoder.shift
        self.post_quant_conv = Conv2d(self.channels, self.channels, 1)
        self.decoder = _Kl16Convolutions(self.channels)

    def image(self, latents: Tensor) -> Tensor:
        """The decoded image [B, 3, H, W], about -1..1, before clipping."""
        (rows, columns), patch, channels = self.grid, self.patch, self.channels
        cells = latents.reshape(-1, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
        grid = cells.reshape(-1, channels, rows * patch, columns * patch) / self.scale
        if self.shift:
            grid = grid + self.shift
        return self.decoder(self.post_quant_conv(grid).float())

    def forward(self, latents: Tensor) -> Tensor:
        return to_pixels(self.image(latents).permute(0, 2, 3, 1))


class PatchDecoder(nn.Module):
    """mar-digits: a token is a square of grey pixels in -1..1. Latents [B, L, C] -> RGB uint8 [B, H, W, 3]."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.grid, self.size = architecture.grid, architecture.image_size
        self.patch = architecture.decoder.patch

    def forward(self, latents: Tensor) -> Tensor:
        rows, columns = self.grid
        patches = latents.reshape(-1, rows, columns, self.patch, self.patch).permute(0, 1, 3, 2, 4)
        return to_pixels(patches.reshape(-1, *self.size, 1).expand(-1, -1, -1, 3))


def to_pixels(image: Tensor) -> Tensor:
    """-1..1 -> uint8, round(clip((image + 1) / 2 * 255, 0, 255)) (engine_mar.py). Comes last: TensorRT has uint8 for
    inputs and outputs only."""
    return torch.round(torch.clamp((image + 1) / 2 * 255, 0, 255)).to(torch.uint8)


DECODER_MODULES: dict[str, type[nn.Module]] = {"kl16": Kl16Decoder, "patches": PatchDecoder}
"""Kind of decoder (``architecture.DECODERS``) to its module, which takes the architecture."""


def build_decoder(architecture: Architecture) -> nn.Module:
    """The decoder module of a model, without weights loaded."""
    return DECODER_MODULES[architecture.decoder.kind](architecture)
