"""The models that this project knows by name: sizes, published settings, and where the weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.models.architecture import Architecture
from ..runtime.models.families import known_models
from ..runtime.models.family import KnownModel

MEBIBYTE = 2**20


@dataclass(frozen=True)
class WeightSource:
    """A published file.

    Attributes:
        url: download address, from util/download.py of the original project (``dl=1`` asks for the file itself).
        default_path: where the original project's own scripts put it, relative to its folder.
        mebibytes: published size, rounded to whole MiB.
        sha256: of the published file, where somebody has published that; not checked by this project, which could not
            download the file. Compared and named, never required.
    """

    url: str
    default_path: str
    mebibytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class ModelEntry:
    """One model of the zoo.

    Attributes:
        model: sizes, what it can be asked for, and what its plans start from.
        checkpoint: published weights; None where they ship with the package.
        vae: published VAE; None where the model needs none.
        shipped: weights inside the package, or None.
    """

    model: KnownModel
    checkpoint: WeightSource | None = None
    vae: WeightSource | None = None
    shipped: Path | None = None

    @property
    def architecture(self) -> Architecture:
        """Sizes."""
        return self.model.architecture

    @property
    def plan_defaults(self) -> dict[str, Any]:
        """Settings that plans on this model start from (``runtime.sampling.plan.preset``)."""
        return dict(self.model.plan_defaults)


_BASE = "https://www.dropbox.com/scl/fi/"
KL16 = WeightSource(
    _BASE + "hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1",
    "pretrained_models/vae/kl16.ckpt",
    254,
    "34ce001bcfffb7af67ec8af1e683a30d7bd45760855ddc7deedc1330f2cfd38f",  # 265,900,046 bytes; see MAR_B_SHA256
)
MAR_B_SHA256 = "7e970a33bc90353e2fabe3498ed1f2d194dd8d17cd387665f80b2984dfca538c"  # 1,663,614,946 bytes
"""From a public protocol (Dramwig/CoFiTok-internal, docs/records/2026-07-11_mar_official_pth_recovery_protocol.md)."""


def _mar(name: str, path: str, folder: str, mebibytes: int, sha256: str | None = None) -> ModelEntry:
    return ModelEntry(
        model=known_models()[name],
        checkpoint=WeightSource(_BASE + path, f"pretrained_models/mar/{folder}/checkpoint-last.pth", mebibytes, sha256),
        vae=KL16,
    )


MODELS: dict[str, ModelEntry] = {
    "mar-b": _mar(
        "mar-b",
        "f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1",
        "mar_base",
        1587,
        MAR_B_SHA256,
    ),
    "mar-l": _mar(
        "mar-l", "pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1", "mar_large", 3650
    ),
    "mar-h": _mar(
        "mar-h", "1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1", "mar_huge", 7191
    ),
    "mar-digits": ModelEntry(
        model=known_models()["mar-digits"], shipped=Path(__file__).parent / "data" / "mar_digits.safetensors"
    ),
}


def published(model: str, name: str, digest: str) -> str:
    """Whether a file is one that was published, for people; empty where nobody can tell.

    Args:
        model: the model that it is for; one of :data:`MODELS` or not.
        name: ``checkpoint`` or ``vae``.
        digest: SHA-256 of the file.
    """
    entries = {known: {"checkpoint": entry.checkpoint, "vae": entry.vae} for known, entry in MODELS.items()}
    for known, sources in entries.items():
        source = sources[name]
        if source is not None and source.sha256 == digest:
            return "the published KL-16 VAE" if name == "vae" else f"the published {known} checkpoint"
    source = entries[model][name] if model in entries else None
    return "not the published file" if source is not None and source.sha256 else ""
