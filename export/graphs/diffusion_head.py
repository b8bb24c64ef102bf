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


class Modulated(nn.Module):
    """Holds the product that makes ``parts`` vectors of one layer's modulation, under the checkpoint's name."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, parts * width))


class Modulation(nn.Module):
    """Shift, scale and gate of every block, then shift and scale of the final layer. [ours]

    They depend on the timestep and on z, not on x, so that they can be made for many reverse steps at once and their
    weights, 59 % of the head's, are read once. Attribute names are the checkpoint's keys after ``diffloss.net.``.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width = architecture.head_width
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = Linear(architecture.width, width)
        self.res_blocks = nn.ModuleList(Modulated(width, 3) for _ in range(architecture.head_depth))
        self.final_layer = Modulated(width, 2)
        self.adaLN_modulation: Linear | None = None

    @property
    def _products(self) -> list[Linear]:
        return [part for part in (*self.res_blocks.modules(), *self.final_layer.modules()) if isinstance(part, Linear)]

    def fuse_for_export(self) -> None:
        """One product in place of all, once. The module can no longer load or save checkpoints."""
        products = self._products
        fused = Linear(products[0].in_features, sum(product.out_features for product in products))
        for name in ("weight", "bias"):
            joined = torch.cat([getattr(product, name).detach() for product in products])
            setattr(fused, name, nn.Parameter(joined, requires_grad=False))
        self.adaLN_modulation = fused
        del self.res_blocks, self.final_layer

    def forward(self, z: Tensor, row: Tensor, timestep: Tensor) -> Tensor:
        """Modulation of T rows, float32 [T, (3 depth + 2) W].

        Args:
            z: float32 [Q, D], condition vectors.
            row: int64 [T], which of them.
            timestep: int64 [T], original index 0..999.
        """
        condition = self.time_embed(timestep).float() + self.cond_embed(z).float().index_select(0, row)
        activated = F.silu(condition)
        if self.adaLN_modulation is not None:
            return self.adaLN_modulation(activated).float()
        return torch.cat([product(activated) for product in self._products], dim=-1).float()


class ResidualBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = LayerNorm(width)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift).float()


class FinalLayer(nn.Module):
    """LayerNorm without weights, modulation, Linear to [eps | variance]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width, affine=False)
        self.linear = Linear(width, outputs)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.linear(self.norm_final(x) * (1 + scale) + shift).float()


class DiffusionHead(nn.Module):
    """MLP with adaptive LayerNorm, without what makes its modulation. Attribute names are the checkpoint's keys after
    ``diffloss.net.``."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.width, self.channels = architecture.head_width, architecture.token_channels
        self.input_proj = Linear(self.channels, self.width, keep_float32=True)
        self.res_blocks = nn.ModuleList(ResidualBlock(self.width) for _ in range(architecture.head_depth))
        self.final_layer = FinalLayer(self.width, 2 * self.channels)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and variance interpolation that the head predicts, both float32.

        Args:
            x: float32 [N, C], noisy tokens, shared by the branches.
            modulation: float32 [G, N, (3 depth + 2) W], see :class:`Modulation`.

        Returns:
            eps [G, N, C], variance [G, N, C].
        """
        *blocks, shift, scale = modulation.split(self.width, dim=-1)
        hidden = self.input_proj(x).float().expand(*shift.shape)
        for index, block in enumerate(self.res_blocks):
            hidden = block(hidden, *blocks[3 * index : 3 * index + 3])
        eps, variance = self.final_layer(hidden, shift, scale).split(self.channels, dim=-1)
        return eps, variance


class DiffusionStep(nn.Module):
    """One whole reverse step: head, guidance, learned variance, posterior mean, noise. Arithmetic in float32."""

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, modulation: Tensor, coefficients: Tensor, guidance: Tensor, noise: Tensor) -> Tensor:
        """x_t -> x_(t-1).

        Args:
            x: float32 [N, C].
            modulation: float32 [G, N, (3 depth + 2) W]; branch 0 conditional, the last one unconditional (the same one
                without guidance).
            coefficients: float32 [N, K], columns as ``runtime.diffusion.COEFFICIENTS``.
            guidance: float32 [N], the guidance scale; 1 is none.
            noise: float32 [N, C], standard normal.

        Returns:
            float32 [N, C].
        """
        eps, variance = self.head(x, modulation)
        conditional, unconditional = eps.select(0, 0), eps.select(0, -1)
        eps = unconditional + guidance.unsqueeze(1) * (conditional - unconditional)
        columns = coefficients.split(1, dim=1)
        recip, recipm1, mean_x0, mean_xt, log_posterior, log_beta, noise_scale = columns
        x0 = recip * x - recipm1 * eps
        mean = mean_x0 * x0 + mean_xt * x
        fraction = (variance.select(0, 0) + 1) / 2
        log_variance = fraction * log_beta + (1 - fraction) * log_posterior
        return mean + noise_scale * torch.exp(0.5 * log_variance) * noise
