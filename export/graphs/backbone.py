"""The masked-autoregressive transformer: known tokens and positions in, condition vectors z out.

Same function as models/mar.py (``forward_mae_encoder`` + ``forward_mae_decoder``) of the original project, and the same
state dict. Attention has no order, so tokens stand as predict | buffer | visible | context and carry their own position
embedding: no scatter, no boolean mask, and the wanted rows are a prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime.models.mar import MarArchitecture, MaskedTransformer
from .layers import Block, LayerNorm, Linear


class _MaskedTransformer(nn.Module):
    """MAR encoder and decoder. Attribute names are the checkpoint's keys."""

    def __init__(self, architecture: MaskedTransformer) -> None:
        super().__init__()
        width, slots = architecture.width, architecture.buffer + architecture.tokens
        self.buffer = architecture.buffer
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj = Linear(architecture.token_channels, width, keep_float32=True)
        self.z_proj_ln = LayerNorm(width)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, slots, width))
        self.encoder_blocks = nn.ModuleList(Block(width, architecture.heads) for _ in range(architecture.depth))
        self.encoder_norm = LayerNorm(width)
        self.decoder_embed = Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, slots, width))
        self.decoder_blocks = nn.ModuleList(Block(width, architecture.heads) for _ in range(architecture.depth))
        self.decoder_norm = LayerNorm(width)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, architecture.tokens, width))

    def vectors(self, tokens: Tensor, visible: Tensor, predict: Tensor, context: Tensor, embedding: Tensor) -> Tensor:
        """Condition vectors of the tokens to predict.

        Args:
            tokens: float32 [B, V, C], the known tokens.
            visible: int64 [B, V], their positions on the grid, row by row.
            predict: int64 [B, P], positions to predict now.
            context: int64 [B, R], other unknown positions that the decoder sees as mask tokens.
            embedding: float32 [G, B, D], what the buffer holds copies of.

        Returns:
            float32 [G, B, P, D].
        """
        branches, batch, _ = embedding.shape
        known, predicted = visible.shape[1], predict.shape[1]
        width = self.fake_latent.shape[1]

        # Everything that does not depend on the branch is computed once per image, then repeated.
        positions = self.encoder_pos_embed_learned[0]
        buffer = embedding.unsqueeze(2) + positions[: self.buffer]
        buffer = self.z_proj_ln(buffer).reshape(branches * batch, self.buffer, width)
        image = self.z_proj_ln(self.z_proj(tokens).float() + F.embedding(visible + self.buffer, positions))
        image = image.unsqueeze(0).expand(branches, batch, known, width).reshape(branches * batch, known, width)
        x = torch.cat([buffer, image], dim=1)
        for block in self.encoder_blocks:
            x = block(x)
        x = self.decoder_embed(self.encoder_norm(x)).float()

        positions = self.decoder_pos_embed_learned[0]
        unknown = torch.cat([predict, context], dim=1)
        masked = self.mask_token + F.embedding(unknown + self.buffer, positions)
        length = unknown.shape[1]
        masked = masked.unsqueeze(0).expand(branches, batch, length, width).reshape(branches * batch, length, width)
        known_positions = torch.cat(
            [positions[: self.buffer].expand(batch, self.buffer, width), F.embedding(visible + self.buffer, positions)],
            dim=1,
        )
        seen = self.buffer + known
        known_positions = known_positions.unsqueeze(0).expand(branches, batch, seen, width)
        x = torch.cat([masked, x + known_positions.reshape(branches * batch, seen, width)], dim=1)
        # After the last block nothing reads any row but those to predict.
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, predicted)
        z = self.decoder_norm(x).reshape(branches, batch, predicted, width)
        return z + F.embedding(predict, self.diffusion_pos_embed_learned[0])


class Backbone(_MaskedTransformer):
    """MAR with classes."""

    def __init__(self, architecture: MarArchitecture) -> None:
        super().__init__(architecture)
        self.class_emb = nn.Embedding(architecture.classes, architecture.width)

    def forward(self, tokens: Tensor, visible: Tensor, predict: Tensor, context: Tensor, labels: Tensor) -> Tensor:
        """As :meth:`vectors`; labels int64 [G, B]: row 0 the class, row 1 (with guidance) the null label."""
        names = torch.cat([self.class_emb.weight, self.fake_latent])
        return self.vectors(tokens, visible, predict, context, F.embedding(labels, names))


class UnconditionalBackbone(_MaskedTransformer):
    """MAR without classes: every image has the null embedding, as in the original's ``sample_tokens(labels=None)``."""

    def forward(self, tokens: Tensor, visible: Tensor, predict: Tensor, context: Tensor) -> Tensor:
        """As :meth:`vectors`; [1, B, P, D]."""
        embedding = self.fake_latent.unsqueeze(0).expand(1, predict.shape[0], self.fake_latent.shape[1])
        return self.vectors(tokens, visible, predict, context, embedding)
