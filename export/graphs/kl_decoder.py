"""The decoder half of a KL autoencoder, of any size: latent diffusion's, MAR's KL-16, Stable Diffusion's.

AutoencoderKL of CompVis/latent-diffusion (``ldm/modules/diffusionmodules/model.py``, models/vae.py of the original
project), with its state dict's names; diffusers' is the same network under other names (export/build/vae.py). Sizes
come from the shapes of the weights. Does not know tokens, scales or pixels (decoders.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Conv2d

_MOST_LEVELS, _MOST_BLOCKS, _WIDEST = 9, 32, 1 << 14


@dataclass(frozen=True)
class KlLayout:
    """What a decoder is made of. ``up`` is a level per halving of the picture, the finished one first.

    Attributes:
        latent_channels: of what is decoded.
        widths: channels of each level.
        blocks: residual blocks a level; one more than the encoder's.
        attention: levels with self-attention after every residual block.
        middle_attention: between the two residual blocks of the middle.
        inner_channels: what ``post_quant_conv`` makes of the latents; None without one.
        groups: of every GroupNorm.
    """

    latent_channels: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    inner_channels: int | None = None
    groups: int = 32

    @property
    def stride(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.widths) - 1)


KL16_LAYOUT = KlLayout(16, (128, 128, 256, 256, 512), blocks=3, inner_channels=16)
"""MAR's VAE."""


def layout_of(state: Mapping[str, Any], groups: int = 32) -> KlLayout:
    """The sizes that a state dict's shapes say; whether it has exactly what these need is for the caller to compare.

    Args:
        groups: of every GroupNorm; no shape says it.

    Raises:
        ValueError: no such decoder; a text without the file's name.
    """

    def shape(key: str) -> tuple[int, ...]:
        found = state.get(key)
        if not isinstance(found, Tensor) or found.dim() != 4:
            raise ValueError(f"no {key} of 4 axes")
        return tuple(found.shape)

    def count(prefix: str) -> int:
        return len({match[1] for key in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))})

    inner = shape("decoder.conv_in.weight")[1]
    levels, blocks = count("decoder.up."), count("decoder.up.0.block.")
    if not 1 <= levels <= _MOST_LEVELS or not 1 <= blocks <= _MOST_BLOCKS:
        raise ValueError(f"{levels} levels of {blocks} residual blocks in decoder.up")
    widths = tuple(shape(f"decoder.up.{level}.block.0.conv2.weight")[0] for level in range(levels))
    for width in widths:
        if not 1 <= width <= _WIDEST or width % groups:
            raise ValueError(f"{width} channels are not those of {groups} groups (GroupNorm)")
    converted = "post_quant_conv.weight" in state
    latent = shape("post_quant_conv.weight")[1] if converted else inner
    if not 1 <= min(latent, inner) <= max(latent, inner) <= _WIDEST:
        raise ValueError(f"latents of {latent} channels, {inner} inside")
    return KlLayout(
        latent,
        widths,
        blocks,
        attention=tuple(level for level in range(levels) if f"decoder.up.{level}.attn.0.q.weight" in state),
        middle_attention="decoder.mid.attn_1.q.weight" in state,
        inner_channels=inner if converted else None,
        groups=groups,
    )


class GroupNorm(nn.GroupNorm):
    """eps 1e-6, always in float32."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float())


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus a shortcut; float32 residual stream."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, inputs)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(groups, outputs)
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

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels)
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
    def __init__(self, layout: KlLayout) -> None:
        super().__init__()
        channels = layout.widths[-1]
        self.block_1 = ResnetBlock(layout.groups, channels, channels)
        if layout.middle_attention:
            self.attn_1 = AttentionBlock(layout.groups, channels)
        self.block_2 = ResnetBlock(layout.groups, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x)
        return self.block_2(x)


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")).float()


class _Level(nn.Module):
    def __init__(self, layout: KlLayout, level: int) -> None:
        super().__init__()
        outputs = layout.widths[level]
        inputs = layout.widths[min(level + 1, len(layout.widths) - 1)]
        every = range(layout.blocks)
        self.block = nn.ModuleList(ResnetBlock(layout.groups, outputs if i else inputs, outputs) for i in every)
        self.attn = nn.ModuleList(AttentionBlock(layout.groups, outputs) for _ in every if level in layout.attention)
        if level:
            self.upsample = _Upsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class KlConvolutions(nn.Module):
    """``decoder.*`` of the checkpoint."""

    def __init__(self, layout: KlLayout) -> None:
        super().__init__()
        widths = layout.widths
        self.conv_in = Conv2d(layout.inner_channels or layout.latent_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(layout)
        self.up = nn.ModuleList(_Level(layout, level) for level in range(len(widths)))
        self.norm_out = GroupNorm(layout.groups, widths[0])
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x).float())
        for level in range(len(self.up) - 1, -1, -1):
            x = self.up[level](x)
        return self.conv_out(F.silu(self.norm_out(x))).float()


class KlDecoder(nn.Module):
    """Latents [B, C, h, w] -> image [B, 3, stride h, stride w], about -1..1, before clipping. Attribute names are the
    VAE checkpoint's keys."""

    def __init__(self, layout: KlLayout) -> None:
        super().__init__()
        if layout.inner_channels is not None:
            self.post_quant_conv = Conv2d(layout.latent_channels, layout.inner_channels, 1)
        self.decoder = KlConvolutions(layout)

    def forward(self, latents: Tensor) -> Tensor:
        if hasattr(self, "post_quant_conv"):
            latents = self.post_quant_conv(latents).float()
        return self.decoder(latents)
