"""What a model is made of: sizes, nothing else.

Plans, FLOP counts and manifests need neither weights nor an engine. What only one family has is a field of its own
subclass (mar.py). Does not know where weights come from (export/zoo.py) or how a graph is written (export/graphs).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Size = Annotated[int, Meta(ge=1, le=1 << 16)]
"""A count of channels, tokens or layers; no model needs more, and a manifest that lies allocates no terabytes."""


DECODERS: dict[str, bool] = {"kl": True, "patches": False, "none": False}
"""Kind of decoder to whether it has weights of its own, in a VAE's file: that of a KL autoencoder, such as MAR's KL-16;
tokens that are squares of grey or RGB pixels; none, where latents are all that a model gives. The torch side is
export/graphs/decoders.py."""

_COLOURS = {1: "grey", 3: "RGB"}


class Decoder(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How latents become pixels: z = latents / scale + shift, then the decoder of a kind.

    Attributes:
        kind: a key of :data:`DECODERS`.
        stride: pixels along one side of a latent cell.
        patch: latent cells along one side of a token; its channels are theirs, one channel's cells after the other's.
        scale: tokens are the decoder's latents times this.
        shift: what is added after dividing.
        groups: of the decoder's GroupNorms.
    """

    kind: str
    stride: Annotated[int, Meta(ge=1, le=256)]
    patch: Annotated[int, Meta(ge=1, le=64)] = 1
    scale: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    shift: Annotated[float, Meta(ge=-1e6, le=1e6)] = 0.0
    groups: Annotated[int, Meta(ge=1, le=1024)] = 32

    def __post_init__(self) -> None:
        if self.kind not in DECODERS:
            raise ValueError(f"decoder {self.kind[:40]!r} is not one of {', '.join(DECODERS)}")
        if self.kind == "patches" and (self.stride, self.scale, self.shift) != (1, 1.0, 0.0):
            raise ValueError("decoder patches has neither scale nor shift, and a stride of 1")

    @property
    def has_weights(self) -> bool:
        """Whether it comes with a weights file."""
        return DECODERS[self.kind]

    @property
    def makes_pictures(self) -> bool:
        """Whether there is one."""
        return self.kind != "none"


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
        if self.decoder.kind == "patches" and self.cell_channels not in _COLOURS:
            patch, channels = self.decoder.patch, self.token_channels
            raise ValueError(f"{channels} channels of a token are neither {patch}x{patch} grey pixels nor RGB ones")
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
    def cell_channels(self) -> int:
        """Channels of one latent cell: what the decoder's latents have."""
        return self.token_channels // self.decoder.patch**2

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of a decoded image; without a decoder as far as stride and patch are known."""
        side = self.decoder.stride * self.decoder.patch
        return self.grid[0] * side, self.grid[1] * side

    @property
    def decoding(self) -> str:
        """How latents become pictures, on one line for people."""
        decoder, (height, width) = self.decoder, self.image_size
        latents = f"{self.cell_channels} channels, stride {decoder.stride}, patch {decoder.patch}, "
        latents += f"scale {decoder.scale:g}, shift {decoder.shift:g}"
        if decoder.kind == "none":
            unknown = decoder == Decoder(kind="none", stride=1)
            return "none; latents are what comes out" + (f": {latents}" if not unknown else "")
        if decoder.kind == "patches":
            latents = f"{decoder.patch}x{decoder.patch} {_COLOURS[self.cell_channels]} pixels a token"
        else:
            latents = f"KL autoencoder, {latents}"
        return f"{latents}; pictures of {height}x{width}"
