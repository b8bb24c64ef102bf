"""What a model is made of: sizes, nothing else.

Plans, FLOP counts and manifests need neither weights nor an engine. What only one family has is a field of its own
subclass (mar.py). Does not know where weights come from (export/zoo.py) or how a graph is written (export/graphs).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Size = Annotated[int, Meta(ge=1, le=1 << 16)]
"""A count of channels, tokens or layers; no model needs more, and a manifest that lies allocates no terabytes."""


DECODERS: dict[str, bool] = {"kl16": True, "patches": False}
"""Kind of decoder to whether it has weights of its own, in a VAE's file: latent diffusion's VAE of stride 16, which is
MAR's; tokens that are squares of grey pixels. The torch side is export/graphs/decoders.py."""


class Decoder(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How latents become pixels: z = latents / scale + shift, then the decoder of a kind.

    Attributes:
        kind: a key of :data:`DECODERS`.
        stride: pixels along one side of a latent cell.
        patch: latent cells along one side of a token; its channels are theirs, one channel's cells after the other's.
        scale: tokens are the decoder's latents times this.
        shift: what is added after dividing.
    """

    kind: str
    stride: Annotated[int, Meta(ge=1, le=256)]
    patch: Annotated[int, Meta(ge=1, le=64)] = 1
    scale: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    shift: Annotated[float, Meta(ge=-1e6, le=1e6)] = 0.0

    def __post_init__(self) -> None:
        if self.kind not in DECODERS:
            raise ValueError(f"decoder {self.kind[:40]!r} is not one of {', '.join(DECODERS)}")
        if not self.has_weights and (self.scale, self.shift) != (1.0, 0.0):
            raise ValueError(f"decoder {self.kind} has neither scale nor shift")

    @property
    def has_weights(self) -> bool:
        """Whether it comes with a weights file."""
        return DECODERS[self.kind]


class Architecture(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="family", tag="any"):
    """Sizes that every family has. Names follow the original code's arguments where it has them.

    Attributes:
        name: for people; a zoo name such as ``mar-b``, or the user's own.
        grid: (height, width) of the token grid.
        token_channels: channels C of one token.
        width: transformer width D, and the width of a condition vector z.
        head_depth: residual blocks of the diffusion head.
        head_width: width W of the diffusion head.
        decoder: latents to pixels.
    """

    name: Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")]
    grid: tuple[Annotated[int, Meta(ge=1, le=1024)], Annotated[int, Meta(ge=1, le=1024)]]
    token_channels: Size
    width: Size
    head_depth: Annotated[int, Meta(ge=1, le=1024)]
    head_width: Size
    decoder: Decoder

    def __post_init__(self) -> None:
        if self.token_channels % self.decoder.patch**2:
            patch = self.decoder.patch
            raise ValueError(f"{self.token_channels} channels of a token are not those of {patch}x{patch} patches")
        if self.tokens * self.token_channels > 1 << 24 or max(self.image_size) > 1 << 14:
            raise ValueError(
                f"{self.tokens} tokens of {self.token_channels} channels, {self.image_size[0]}x{self.image_size[1]} "
                "pixels: no picture needs so many"
            )

    @property
    def family(self) -> str:
        """The key of families.FAMILIES."""
        tag = self.__struct_config__.tag
        assert isinstance(tag, str)
        return tag

    @property
    def tokens(self) -> int:
        """L, the number of tokens of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def modulation(self) -> int:
        """(3 depth + 2) W, what the diffusion head adds to and multiplies with x in one reverse step of one row."""
        return (3 * self.head_depth + 2) * self.head_width

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of a decoded image."""
        side = self.decoder.stride * self.decoder.patch
        return self.grid[0] * side, self.grid[1] * side
