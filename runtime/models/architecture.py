"""What a MAR model is made of: sizes, nothing else.

Everything here is arithmetic on a handful of integers, so that plans, FLOP counts and manifests need neither weights
nor an engine. Does not know where weights come from (export/zoo.py) or how a graph is written (export/models).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import BundleError


@dataclass(frozen=True)
class Architecture:
    """Sizes of one MAR model. Names follow the original code's arguments where it has them.

    Attributes:
        name: zoo name, for example ``mar-b``.
        grid: (height, width) of the token grid.
        token_channels: channels C of one token (one VAE latent at patch size 1).
        classes: number of classes; label ``classes`` stands for the learned null embedding.
        buffer: copies of the class embedding in front of the tokens.
        width: transformer width D of encoder and decoder, and the width of a condition vector z.
        depth: blocks in the encoder, and the same number in the decoder.
        heads: attention heads.
        head_depth: residual blocks of the diffusion head.
        head_width: width W of the diffusion head.
        decoder: ``kl16`` (latent-diffusion VAE, stride 16) or ``patches`` (a token is a square of grey pixels).
        label_names: which names the classes go by: ``imagenet`` or ``digits``.
    """

    name: str
    grid: tuple[int, int]
    token_channels: int
    classes: int
    buffer: int
    width: int
    depth: int
    heads: int
    head_depth: int
    head_width: int
    decoder: str
    label_names: str

    @property
    def tokens(self) -> int:
        """L, the number of tokens of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def null_label(self) -> int:
        """The label of the unconditional branch: the row after the last class."""
        return self.classes

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of a decoded image."""
        stride = 16 if self.decoder == "kl16" else round(self.token_channels**0.5)
        return self.grid[0] * stride, self.grid[1] * stride

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``model`` section."""
        return {**asdict(self), "grid": list(self.grid)}

    @classmethod
    def from_json(cls, value: Any) -> Architecture:
        """Strict reading: exactly these fields, integers positive.

        Raises:
            BundleError: a field is missing, unknown, of the wrong type or out of range.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or set(value) != set(names):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise BundleError(f"model section must have exactly the fields {sorted(names)}, found {found}")
        settings: dict[str, Any] = dict(value)
        for name in names:
            item = settings[name]
            if name in ("name", "decoder", "label_names"):
                valid = isinstance(item, str)
            elif name == "grid":
                valid = isinstance(item, list) and len(item) == 2 and all(_positive(n) for n in item)
            else:
                valid = _positive(item)
            if not valid:
                raise BundleError(f"model section: {name} = {item!r} is not valid")
        if settings["label_names"] not in ("imagenet", "digits"):
            raise BundleError(f"model section: label_names {settings['label_names']!r} is not imagenet or digits")
        if settings["decoder"] not in ("kl16", "patches"):
            raise BundleError(f"model section: decoder {settings['decoder']!r} is not kl16 or patches")
        if settings["width"] % settings["heads"]:
            raise BundleError(
                f"model section: width {settings['width']} is not a multiple of {settings['heads']} heads"
            )
        settings["grid"] = tuple(settings["grid"])
        return cls(**settings)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _imagenet(name: str, width: int, depth: int, heads: int, head_depth: int, head_width: int) -> Architecture:
    return Architecture(
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
        decoder="kl16",
        label_names="imagenet",
    )


#: The models that this project knows by name. mar-b/l/h: main_mar.py and models/mar.py of the original project.
ARCHITECTURES: dict[str, Architecture] = {
    "mar-b": _imagenet("mar-b", 768, 12, 12, 6, 1024),
    "mar-l": _imagenet("mar-l", 1024, 16, 16, 8, 1280),
    "mar-h": _imagenet("mar-h", 1280, 20, 16, 12, 1536),
    "mar-digits": Architecture(
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
        decoder="patches",
        label_names="digits",
    ),
}

#: Settings that plans on a model start from. cfg of mar-b/l/h: the evaluation commands of the original README, behind
#: the published FIDs. mar-digits: a small model needs DiSA's cap on the diffusion timesteps (docs/plans.md).
PLAN_DEFAULTS: dict[str, dict[str, Any]] = {
    "mar-b": {"cfg": 2.9, "cfg_schedule": "linear", "max_timestep": 999},
    "mar-l": {"cfg": 3.0, "cfg_schedule": "linear", "max_timestep": 999},
    "mar-h": {"cfg": 3.2, "cfg_schedule": "linear", "max_timestep": 999},
    "mar-digits": {"cfg": 2.0, "cfg_schedule": "linear", "max_timestep": 950, "temperature": 0.9},
}
