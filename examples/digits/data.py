"""The handwritten digits that mar-digits is trained on, and how an image becomes tokens.

scikit-learn's ``load_digits``: 1,797 grey images of 8x8 pixels (UCI Optical Recognition of Handwritten Digits,
E. Alpaydin and C. Kaynak, 1998, CC BY 4.0), enlarged here to 32x32 and cut into 8x8 patches of 4x4 pixels.
"""

from __future__ import annotations

import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

PATCH = 4
GRID = 8


def load() -> tuple[Tensor, Tensor]:
    """Images float32 [1797, 1, 32, 32] in [-1, 1] and labels int64 [1797]."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    large = F.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    return large * 2 - 1, torch.tensor(digits.target, dtype=torch.int64)


def to_tokens(images: Tensor) -> Tensor:
    """[B, 1, 32, 32] -> tokens [B, 64, 16], patches row by row, pixels of a patch row by row."""
    patches = images.reshape(-1, GRID, PATCH, GRID, PATCH).permute(0, 1, 3, 2, 4)
    return patches.reshape(-1, GRID * GRID, PATCH * PATCH)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small random rotations, scalings and shifts, so that 1,797 images are not simply learned by heart."""
    count = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(8)), 1 + uniform(0.07)
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = [cosine, -sine, uniform(0.05), sine, cosine, uniform(0.05)]
    grid = F.affine_grid(torch.stack(rows, dim=1).reshape(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bilinear", align_corners=False) - 1
