"""The family ``mar``: class-conditional masked autoregressive models, main_mar.py and models/mar.py of LTH14/mar; and
``mar-unconditional``, the same without classes: the buffer holds copies of the null embedding."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from .architecture import Architecture, Decoder, Size
from .class_conditioner import DIGITS, ClassConditioner, imagenet
from .family import Family, KnownModel
from .flops import FREQUENCIES, block_flops, head_flops
from .graphs import GraphSpec, masked_generator_specs
from .nothing import NothingAsked


class MaskedTransformer(Architecture, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of MAR's transformer.

    Attributes:
        buffer: copies of the class embedding in front of the tokens.
        depth: blocks in the encoder, and the same number in the decoder.
        heads: attention heads.
    """

    buffer: Annotated[int, Meta(ge=0, le=1 << 16)]
    depth: Annotated[int, Meta(ge=1, le=1024)]
    heads: Size

    def __post_init__(self) -> None:
        Architecture.__post_init__(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")


class MarArchitecture(MaskedTransformer, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="mar"):
    """Sizes of one MAR model; label ``classes`` stands for the learned null embedding."""

    classes: Size


class UnconditionalArchitecture(
    MaskedTransformer, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="mar-unconditional"
):
    """Sizes of a MAR that knows no classes."""


def graph_specs(architecture: MarArchitecture, max_batch: int) -> dict[str, GraphSpec]:
    """Of one model; the backbone's only conditioning is the class label."""
    return masked_generator_specs(architecture, max_batch, ClassConditioner.inputs)


def backbone_flops(architecture: MaskedTransformer, known: int, predicted: int, context: int, branches: int) -> int:
    """FLOPs of one backbone call per image: the encoder sees buffer and known tokens, the decoder all of them."""
    width, channels = architecture.width, architecture.token_channels
    seen = architecture.buffer + known
    blocks = sum(architecture.depth * block_flops(n, width) for n in (seen, seen + predicted + context))
    return branches * (blocks + 2 * seen * width**2) + 2 * known * channels * width


def parameters(architecture: MaskedTransformer) -> int:
    """Weights of backbone and head, counted from the sizes alone."""
    a = architecture
    d, w, c = a.width, a.head_width, a.token_channels
    block = 12 * d * d + 13 * d
    classes = a.classes if isinstance(a, MarArchitecture) else 0
    embeddings = (classes + 2) * d + 2 * (a.buffer + a.tokens) * d + a.tokens * d
    projections = (c * d + d) + 2 * d + 2 * d + (d * d + d) + 2 * d
    head_block = 2 * w + 2 * (w * w + w) + 3 * (w * w + w)
    head = (FREQUENCIES * w + w) + (w * w + w) + (d * w + w) + (c * w + w) + a.head_depth * head_block
    head += 2 * (w * w + w) + (w * 2 * c + 2 * c)
    return 2 * a.depth * block + embeddings + projections + head


_BASELINE: dict[str, Any] = {
    "order": "random",
    "token_schedule": "cosine",
    "generation_diffusion": (100, 100),
    "fts": "none",
}
#: mar, mar-256: as MAR published them; gtr [paper]; gtr-compact, gtr-fast, halton's step counts [ours]; disa: DiSA.
PRESETS: dict[str, dict[str, Any]] = {
    "mar": {"stage_steps": (64,), **_BASELINE},
    "mar-256": {"stage_steps": (256,), **_BASELINE},
    "gtr": {"stage_steps": (24, 6, 2)},
    "gtr-compact": {"stage_steps": (24, 6, 2), "context": "compact"},
    "gtr-fast": {"stage_steps": (12, 3, 1)},
    "disa": {"stage_steps": (64,), **_BASELINE, "generation_diffusion": (50, 5), "max_timestep": 950},
    "halton": {"stage_steps": (16,), **_BASELINE, "order": "halton"},
}

KL16 = Decoder(kind="kl", stride=16, scale=0.2325)
"""MAR's VAE; its latents are the VAE's times the scale (main_mar.py)."""


def _imagenet(
    name: str, width: int, depth: int, heads: int, head_depth: int, head_width: int, cfg: float
) -> KnownModel:
    architecture = MarArchitecture(
        name=name,
        grid=(16, 16),
        token_channels=16,
        classes=1000,
        buffer=64,
        width=width,
        depth=depth,
        heads=heads,
        head_depth=head_depth,
        head_width=head_width,
        decoder=KL16,
    )
    # cfg: the evaluation commands of the original README, behind the published FIDs.
    defaults = {"cfg": cfg, "cfg_schedule": "linear", "max_timestep": 999}
    return KnownModel(architecture, ClassConditioner(imagenet()), defaults)


_DIGITS = KnownModel(
    MarArchitecture(
        name="mar-digits",
        grid=(8, 8),
        token_channels=16,
        classes=10,
        buffer=16,
        width=128,
        depth=4,
        heads=4,
        head_depth=3,
        head_width=192,
        decoder=Decoder(kind="patches", stride=1, patch=4),
    ),
    ClassConditioner(DIGITS),
    # A small model needs DiSA's cap on the diffusion timesteps (docs/plans.md).
    {"cfg": 2.0, "cfg_schedule": "linear", "max_timestep": 950, "temperature": 0.9},
)

MAR = Family(
    architecture=MarArchitecture,
    conditioner=ClassConditioner,
    graph_specs=graph_specs,
    presets=PRESETS,
    backbone_flops=backbone_flops,
    head_flops=head_flops,
    parameters=parameters,
    models={
        "mar-b": _imagenet("mar-b", 768, 12, 12, 6, 1024, 2.9),
        "mar-l": _imagenet("mar-l", 1024, 16, 16, 8, 1280, 3.0),
        "mar-h": _imagenet("mar-h", 1280, 20, 16, 12, 1536, 3.2),
        "mar-digits": _DIGITS,
    },
)

UNCONDITIONAL = Family(
    architecture=UnconditionalArchitecture,
    conditioner=NothingAsked,
    graph_specs=lambda architecture, max_batch: masked_generator_specs(architecture, max_batch, ()),
    presets=PRESETS,
    backbone_flops=backbone_flops,
    head_flops=head_flops,
    parameters=parameters,
    models={},
)
"""Plans are MAR's; nothing is guided."""
