"""The FTS score of a condition vector, as a graph, so that z need not leave the device to be ranked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...runtime.models.architecture import Architecture
from ...runtime.sampling.selection import detail_basis


class DetailScore(nn.Module):
    """Frequency-weighted DFT magnitude, and the plain norm that it is compared with; float32 throughout."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        cosine, sine, weight = (torch.from_numpy(table) for table in detail_basis(architecture.width))
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        self.register_buffer("weight", weight, persistent=False)
        self.cosine: Tensor
        self.sine: Tensor
        self.weight: Tensor

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, P, D] -> FTS score [B, P] [paper], ||z|| [B, P] [ours]."""
        real, imaginary = torch.matmul(z, self.cosine), torch.matmul(z, self.sine)
        magnitude = torch.sqrt(real * real + imaginary * imaginary)
        return (magnitude * self.weight).sum(dim=-1), torch.sqrt((z * z).sum(dim=-1))
