"""The row graphs: which tokens get the longer chain, and the bookkeeping around it, for backends that keep whole
generations on a device. They move numbers and compute none; selection.py and sampler.py do the same in NumPy.

Built from comparisons, sums, gathers and selections alone: no sort whose order of ties is an engine's choice, no
scatter, and no matrix product, which a GPU may round to TF32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SelectRows(nn.Module):
    """Tokens by rank of their score, the order of ``runtime.selection.select``: ties go to the smaller position."""

    def forward(self, key: Tensor, direction: Tensor, positions: Tensor, row_index: Tensor, ranks: Tensor) -> Tensor:
        """Rows of the tokens that hold the wanted ranks.

        Args:
            key: float32 [B, P], score or norm.
            direction: float32 [1], 1 ranks the highest first, -1 the lowest.
            positions: int64 [B, P], grid positions.
            row_index: int64 [B, P], b P + p; up to 2^24 is exact.
            ranks: int64 [B, K], 0-based.

        Returns:
            int64 [B, K].
        """
        key = key * direction
        mine, other = key.unsqueeze(2), key.unsqueeze(1)
        tied = (mine == other) & (positions.unsqueeze(1) < positions.unsqueeze(2))
        rank = ((other > mine) | tied).float().sum(dim=2)
        hit = rank.unsqueeze(1) == ranks.float().unsqueeze(2)
        found = (hit.float() * row_index.float().unsqueeze(1)).sum(dim=2)
        # Keys that are not numbers have no ranks; without the limit their rows could lie outside every buffer.
        return torch.minimum(found, row_index.float().amax(dim=1, keepdim=True)).to(torch.int64)


class GatherRows(nn.Module):
    """The rows with the longer chain, for the reverse steps that they take alone."""

    def forward(self, z: Tensor, x: Tensor, noise: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [G, N, D], x [N, C], noise [S, N, C], rows int64 [M] -> the same of those rows."""
        return z.index_select(1, rows), x.index_select(0, rows), noise.index_select(1, rows)


class MergeRows(nn.Module):
    """Puts those rows back, and makes the tables of the reverse steps that all rows take together."""

    def forward(
        self,
        x: Tensor,
        x_rows: Tensor,
        rows: Tensor,
        row_index: Tensor,
        slot_index: Tensor,
        noise_short: Tensor,
        noise_long: Tensor,
        timestep_short: Tensor,
        timestep_long: Tensor,
        coefficients_short: Tensor,
        coefficients_long: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tables of S common reverse steps.

        Args:
            x: float32 [N, C], x_T of every row.
            x_rows: float32 [M, C], what the longer chain has made of its rows.
            rows: int64 [M].
            row_index: int64 [N], 0..N-1.
            slot_index: int64 [M], 0..M-1.
            noise_short, noise_long: float32 [S, N, C], of rows with the shorter and with the longer chain.
            timestep_short, timestep_long: int64 [S].
            coefficients_short, coefficients_long: float32 [S, 7].

        Returns:
            x [N, C], noise [S, N, C], timestep int64 [S, N], coefficients [S, N, 7].
        """
        match = (row_index.unsqueeze(1) == rows.unsqueeze(0)).float()
        longer = match.sum(dim=1) > 0.5
        # Rows that stand twice (see above) would add up to a slot outside of x_rows.
        slot = torch.minimum((match * slot_index.float()).sum(dim=1), slot_index.float().amax(dim=0, keepdim=True))
        slot = slot.to(torch.int64)
        merged = torch.where(longer.unsqueeze(1), x_rows.index_select(0, slot), x)
        noise = torch.where(longer.reshape(1, -1, 1), noise_long, noise_short)
        timestep = torch.where(longer.unsqueeze(0), timestep_long.unsqueeze(1), timestep_short.unsqueeze(1))
        coefficients = torch.where(
            longer.reshape(1, -1, 1), coefficients_long.unsqueeze(1), coefficients_short.unsqueeze(1)
        )
        return merged, noise, timestep, coefficients


ROW_MODULES = {"select_rows": SelectRows, "gather_rows": GatherRows, "merge_rows": MergeRows}
