"""What a person, and a VAE's file that a person names, say of a model whose sizes are looked for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

DECODERS = ("vae", "pixels", "none")
"""What ``--decoder`` takes: a KL autoencoder, squares of pixels, latents only."""


@dataclass(frozen=True)
class VaeFacts:
    """What a VAE's file says.

    Attributes:
        channels: of a latent cell.
        stride: pixels along its side.
        groups: of the GroupNorms.
        scale, shift: of its config.json; None where nobody says it. Of files without one the shift is 0 where there is
            a ``post_quant_conv``: decoders without, SD3's and FLUX's, came with a shift.
        kl16: it has the sizes of MAR's own.
    """

    channels: int
    stride: int
    groups: int = 32
    scale: float | None = None
    shift: float | None = None
    kl16: bool = False


@dataclass(frozen=True)
class Told:
    """What a person says of a model: attention heads, latent cells along a token's side, (rows, columns) of tokens, the
    VAE's file, one of :data:`DECODERS`, what latents were multiplied by after something was subtracted,
    and that classes are left out."""

    heads: int | None = None
    patch_size: int | None = None
    grid: tuple[int, int] | None = None
    vae: VaeFacts | None = None
    decoder: str | None = None
    scale: float | None = None
    shift: float | None = None
    unconditional: bool = False
