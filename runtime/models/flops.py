"""FLOPs of the parts that families share: 2 per multiply-add, matrix products only, VAE decoder left out.

They are the original models' own, so that they can be compared with the paper's. The exported graphs need 2 to 4 %
less: the last decoder block leaves out rows that nothing reads, and the timestep embedding is looked up.
"""

from __future__ import annotations

from .architecture import Architecture

FREQUENCIES = 256
"""Width of the head's sinusoidal timestep embedding."""


def block_flops(tokens: int, width: int) -> int:
    """FLOPs of one transformer block of MLP ratio 4 over ``tokens`` rows that all see each other."""
    return 24 * tokens * width**2 + 4 * tokens * tokens * width


def head_flops(architecture: Architecture, branches: int) -> int:
    """FLOPs of the diffusion head for one token and one reverse step."""
    inner, channels = architecture.head_width, architecture.token_channels
    shared = channels * inner + FREQUENCIES * inner + inner**2
    blocks = architecture.head_depth * 5 * inner**2
    per_branch = architecture.width * inner + blocks + 2 * inner**2 + inner * 2 * channels
    return 2 * (shared + branches * per_branch)
