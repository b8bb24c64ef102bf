"""The per-token diffusion head and its reverse step.

Same function as models/diffloss.py (``SimpleMLPAdaLN``) and gaussian_diffusion.py (``p_sample``) of the original
project, and the head's part of the same state dict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime.models.architecture import Architecture
from ...runtime.sampling.diffusion import TRAINING_STEPS
from .layers import LayerNorm, Linear

FREQUENCIES = 256
"""Width of the sinusoidal timestep embedding."""


class TimestepEmbedder(nn.Module):
    """Original timestep index [N] -> [N, W]: cosines, then sines, in float32; then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))
        half = FREQUENCIES // 2
        # On the CPU even where the module is built on meta: no checkpoint holds this table.
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device="cpu") / half)
        self.register_buffer("rates", rates, persistent=False)
        self.rates: Tensor
        self.table: Tensor | None = None

    def tabulate_for_export(self) -> None:
        """Computes every timestep once: the exported graph looks rows up, without products in each reverse step."""
        if self.table is None:
            with torch.no_grad():
                self.table = self(torch.arange(TRAINING_STEPS)).float()

    def forward(self, timestep: Tensor) -> Tensor:
        if self.table is not None:
            return F.embedding(timestep, self.table)
        angles = timestep.float().unsqueeze(-1) * self.rates
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class ResidualBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift); shift, scale and gate come from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.in_ln = LayerNorm(width)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """``activated`` is SiLU(condition), computed once for all blocks."""
        shift, scale, gate = _parts(self.adaLN_modulation[1](activated), 3, self.width)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift).float()


class FinalLayer(nn.Module):
    """LayerNorm without weights, modulation, Linear to [eps | variance]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.width = width
        self.norm_final = LayerNorm(width, affine=False)
        self.linear = Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        shift, scale = _parts(self.adaLN_modulation[1](activated), 2, self.width)
        return self.linear(self.norm_final(x) * (1 + scale) + shift).float()


def _parts(modulation: Tensor, count: int, width: int) -> tuple[Tensor, ...]:
    """[..., count * width] -> count float32 tensors [..., width]."""
    parts = modulation.float().reshape(*modulation.shape[:-1], count, width)
    return tuple(parts.select(-2, index) for index in range(count))


class DiffusionHead(nn.Module):
    """MLP with adaptive LayerNorm. Attribute names are the checkpoint's keys after ``diffloss.net.``."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width = architecture.head_width
        self.channels = architecture.token_channels
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = Linear(architecture.width, width)
        self.input_proj = Linear(architecture.token_channels, width, keep_float32=True)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(architecture.head_depth))
        self.final_layer = FinalLayer(width, 2 * architecture.token_channels)

    def forward(self, x: Tensor, z: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and variance interpolation that the head predicts, both float32.

        Args:
            x: float32 [N, C], noisy tokens, shared by the branches.
            z: float32 [G, N, D], condition vectors per branch.
            timestep: int64 [N], original index 0..999.

        Returns:
            eps [G, N, C], variance [G, N, C].
        """
        condition = self.time_embed(timestep).float() + self.cond_embed(z).float()
        activated = F.silu(condition)
        hidden = self.input_proj(x).float().expand(*condition.shape)
        for block in self.res_blocks:
            hidden = block(hidden, activated)
        eps, variance = self.final_layer(hidden, activated).split(self.channels, dim=-1)
        return eps, variance


class DiffusionStep(nn.Module):
    """One whole reverse step: head, guidance, learned variance, posterior mean, noise. Arithmetic in float32."""

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, x: Tensor, z: Tensor, timestep: Tensor, coefficients: Tensor, guidance: Tensor, noise: Tensor
    ) -> Tensor:
        """x_t -> x_(t-1).

        Args:
            x: float32 [N, C].
            z: float32 [G, N, D]; branch 0 conditional, the last one unconditional (the same one without guidance).
            timestep: int64 [N].
            coefficients: float32 [N, K], columns as ``runtime.diffusion.COEFFICIENTS``.
            guidance: float32 [N], the guidance scale; 1 is none.
            noise: float32 [N, C], standard normal.

        Returns:
            float32 [N, C].
        """
        eps, variance = self.head(x, z, timestep)
        conditional, unconditional = eps.select(0, 0), eps.select(0, -1)
        eps = unconditional + guidance.unsqueeze(1) * (conditional - unconditional)
        columns = coefficients.split(1, dim=1)
        recip, recipm1, mean_x0, mean_xt, log_posterior, log_beta, noise_scale = columns
        x0 = recip * x - recipm1 * eps
        mean = mean_x0 * x0 + mean_xt * x
        fraction = (variance.select(0, 0) + 1) / 2
        log_variance = fraction * log_beta + (1 - fraction) * log_posterior
        return mean + noise_scale * torch.exp(0.5 * log_variance) * noise
