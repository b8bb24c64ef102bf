"""Layers whose precision is explicit: matrix products in one dtype, everything that needs range in float32.

By construction, whatever the weights' dtype: the residual stream, LayerNorm, GroupNorm and softmax are float32; only a
:class:`Linear` or :class:`Conv2d` and the attention products run in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """``y = x W^T + b`` in the weight's dtype, whatever the input's.

    ``keep_float32`` exempts a layer from :func:`set_precision`: the two that take raw latents, whose range is not
    bounded (an ill-conditioned checkpoint reaches tens of thousands), and which cost next to nothing.

    ``transpose_for_export`` stores the weight as [in, out], so that the exported graph holds ``MatMul(x, constant)``:
    what quantisers and engine builders look for.
    """

    transposed = False

    def __init__(self, inputs: int, outputs: int, keep_float32: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.keep_float32 = keep_float32

    def forward(self, input: Tensor) -> Tensor:
        input = input.to(self.weight.dtype)
        if not self.transposed:
            return F.linear(input, self.weight, self.bias)
        output = torch.matmul(input, self.weight)
        return output + self.bias if self.bias is not None else output

    def transpose_for_export(self) -> None:
        """Switches to the [in, out] layout, once. The module can no longer load or save checkpoints."""
        if not self.transposed:
            self.weight = nn.Parameter(self.weight.detach().t().contiguous(), requires_grad=False)
            self.transposed = True


class Conv2d(nn.Conv2d):
    """2-D convolution in the weight's dtype, whatever the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, eps 1e-6, always in float32."""

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=affine)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float())


class Attention(nn.Module):
    """Multi-head self-attention (timm's ``Attention``: fused qkv with bias, scaled dot product, output projection)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """[B, L, D] -> [B, rows, D]: all tokens are looked at, the first ``rows`` (all by default) look."""
        batch, length, width = x.shape
        # reshape + select, not chunk: chunking freezes symbolic axes in torch's exporter.
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.select(0, 0), qkv.select(0, 1), qkv.select(0, 2)
        if rows is not None:
            query, length = query[:, :, :rows], rows
        # Scaling the query first keeps the product within float16's range.
        scores = torch.matmul(query * self.head_width**-0.5, key.transpose(-2, -1))
        weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
        mixed = torch.matmul(weights, value).transpose(1, 2).reshape(batch, length, width)
        return self.proj(mixed)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear; hidden width 4x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm ViT block with a float32 residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """[B, L, D] -> [B, rows, D], all rows by default; the others only serve as keys and values."""
        mixed = self.attn(self.norm1(x), rows).float()
        x = mixed + (x if rows is None else x[:, :rows])
        return x + self.mlp(self.norm2(x)).float()


def set_precision(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights of :class:`Linear` and :class:`Conv2d` layers inside ``module``; all else stays float32."""
    for child in module.modules():
        if isinstance(child, Conv2d) or (isinstance(child, Linear) and not child.keep_float32):
            child.to(dtype)


def transpose_for_export(module: nn.Module) -> None:
    """Stores every :class:`Linear` weight as [in, out]."""
    for child in module.modules():
        if isinstance(child, Linear):
            child.transpose_for_export()
