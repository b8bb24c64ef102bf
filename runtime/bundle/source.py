"""What a manifest says of the weights that a bundle was made from. Opens none of the files that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from .fields import Count, Name, Sha256, Text


class WeightsFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint: where it lay, what tells it from another, and which of its weights were taken.

    Attributes:
        path: for people; never opened.
        sha256: of the file; of an index and its shards as docs/weights.md says.
        weights: averaged over the training (``ema``), the last ones (``model``), or not said by the file.
        key: the keys of the file that the weights lay under, joined by dots; empty for its top.
        prefix: what was taken off every name, such as ``module.``; empty for nothing.
    """

    path: Text
    sha256: Sha256
    weights: Literal["ema", "model", "unknown"]
    key: Text
    prefix: Text

    @property
    def label(self) -> str:
        """What pictures say of it: ``model_ema sha256:7e970a33bc90``."""
        taken = f"{self.key}.{self.prefix}".strip(".")
        said = f"{taken} (unknown)" if taken and self.weights == "unknown" else taken or self.weights
        return f"{said} sha256:{self.sha256[:12]}"


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle was made from.

    Attributes:
        checkpoint, vae: None for random weights, or where the model has no VAE.
        random_weights: the seed of random weights.
        stages: graph kind to the hash of what it depends on.
        calibration: the same of the calibration of an int8 or fp8 bundle.
    """

    checkpoint: WeightsFile | None
    vae: WeightsFile | None
    random_weights: Count | None
    stages: Mapping[Name, Sha256]
    calibration: Sha256 | None

    @property
    def weights(self) -> tuple[str | int | None, ...]:
        """What tells one set of weights from another, wherever their files lie."""
        files = [(file.sha256, file.key, file.prefix) for file in (self.checkpoint, self.vae) if file]
        return (self.random_weights, *(part for file in files for part in file))

    @property
    def label(self) -> str:
        """What pictures say of the weights: those of the checkpoint, or ``random (seed 0)``."""
        return self.checkpoint.label if self.checkpoint else f"random (seed {self.random_weights})"
