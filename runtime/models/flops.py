"""FLOPs of a plan, counted from the architecture: 2 per multiply-add, matrix products only, VAE decoder left out.

They are MAR's own, so that they can be compared with the paper's. The exported graphs need 2 to 4 % less: the last
decoder block leaves out rows that nothing reads, and the timestep embedding is looked up.
"""

from __future__ import annotations

from .architecture import Architecture

FREQUENCIES = 256
"""Width of the head's sinusoidal timestep embedding."""


def backbone_flops(architecture: Architecture, known: int, predicted: int, context: int, branches: int) -> int:
    """FLOPs of one backbone call per image: the encoder sees buffer and known tokens, the decoder all of them."""
    width, channels = architecture.width, architecture.token_channels
    seen = architecture.buffer + known
    total = seen + predicted + context
    blocks = sum(architecture.depth * (24 * n * width**2 + 4 * n * n * width) for n in (seen, total))
    embed = 2 * seen * width**2
    return branches * (blocks + embed) + 2 * known * channels * width


def head_flops(architecture: Architecture, branches: int) -> int:
    """FLOPs of the diffusion head for one token and one reverse step."""
    inner, channels = architecture.head_width, architecture.token_channels
    shared = channels * inner + FREQUENCIES * inner + inner**2
    blocks = architecture.head_depth * 5 * inner**2
    per_branch = architecture.width * inner + blocks + 2 * inner**2 + inner * 2 * channels
    return 2 * (shared + branches * per_branch)
