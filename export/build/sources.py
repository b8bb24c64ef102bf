"""Which weights a build takes, and how the same ones are found again for verification.

Importing this module does not import torch; weights are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.manifest import Source, WeightsFile
from ...runtime.bundle.reader import Bundle
from ...runtime.commands.console import Reporter
from ...runtime.errors import GtrError, UsageError
from ...runtime.models.architecture import Architecture
from ..zoo import MODELS
from .digests import file_sha256
from .download import find_or_download
from .request import BuildRequest

if TYPE_CHECKING:
    from torch import Tensor

RANDOM_SEED = 0


@dataclass
class Weights:
    """The weights of one build.

    Attributes:
        checkpoint_path, vae_path: files; None for random weights, or where the model has no VAE.
        random_seed: set where the checkpoint is random.
    """

    architecture: Architecture
    checkpoint_path: Path | None
    vae_path: Path | None
    random_seed: int | None
    reporter: Reporter
    _loaded: dict[str, Any] = field(default_factory=dict)

    def identity(self, source: str) -> str:
        """What a stage's hash contains: a file's SHA-256, or the seed of random weights."""
        path = self.checkpoint_path if source == "checkpoint" else self.vae_path
        if path is not None:
            return file_sha256(path)
        if self.random_seed is None or (source == "vae" and not self.architecture.decoder.has_weights):
            return "none"
        return f"random:{self.random_seed}"

    def checkpoint(self) -> Mapping[str, Tensor]:
        """MAR's state dict in the official layout, read once.

        Raises:
            GtrError: the file is not this model's checkpoint.
        """
        if "checkpoint" not in self._loaded:
            from .checkpoints import load_mar, random_mar

            if self.checkpoint_path is None:
                self._loaded["checkpoint"] = random_mar(self.architecture, self.random_seed or 0), "random"
            else:
                weights, taken = load_mar(self.checkpoint_path, self.architecture)
                self.reporter.say(f"weights: {taken} of {self.checkpoint_path}")
                self._loaded["checkpoint"] = weights, taken
        return self._loaded["checkpoint"][0]

    def vae(self) -> Mapping[str, Tensor]:
        """The VAE decoder's state dict; empty where the model has none."""
        if not self.architecture.decoder.has_weights:
            return {}
        if "vae" not in self._loaded:
            from .checkpoints import load_vae_decoder, random_vae_decoder

            if self.vae_path is None:
                self._loaded["vae"] = random_vae_decoder(self.architecture, self.random_seed or 0)
            else:
                self._loaded["vae"] = load_vae_decoder(self.vae_path, self.architecture)
        return self._loaded["vae"]

    def source(self, stages: Mapping[str, str]) -> Source:
        """The manifest's ``source`` section, with the keys of these stages."""
        return Source(_file(self.checkpoint_path), _file(self.vae_path), self.random_seed, stages, None)


def _file(path: Path | None) -> WeightsFile | None:
    return None if path is None else WeightsFile(str(path.resolve()), file_sha256(path))


def resolve_weights(request: BuildRequest, reporter: Reporter) -> Weights:
    """Finds the files: named ones, the package's own, the cache, the original project's folders, then the network.

    Raises:
        UsageError: a named file does not exist.
        GtrError: nothing was found and nothing can be downloaded.
    """
    entry, checkpoint, vae = request.entry(), request.checkpoint, request.vae
    for option, path in (("--checkpoint", checkpoint), ("--vae", vae)):
        if path is not None and not path.is_file():
            raise UsageError(f"{option} {path} is not a file")
    if request.random_weights:
        reporter.say("weights: random; the pictures will be noise")
        return Weights(entry.architecture, None, vae, RANDOM_SEED, reporter)
    checkpoint = checkpoint or entry.shipped
    if checkpoint is None:
        if entry.checkpoint is None:
            raise GtrError(f"{request.model} has no published weights; give a file with --checkpoint")
        checkpoint = find_or_download(entry.checkpoint, f"{request.model}/checkpoint-last.pth", reporter)
    if vae is None and entry.vae is not None:
        vae = find_or_download(entry.vae, "vae/kl16.ckpt", reporter)
    return Weights(entry.architecture, checkpoint, vae, None, reporter)


def weights_of_bundle(
    bundle: Bundle, checkpoint: Path | None, vae: Path | None, reporter: Reporter
) -> tuple[Weights | None, str]:
    """The weights that a bundle was built from, if they can be found again; else None and why.

    Args:
        bundle: its manifest names the files and their SHA-256.
        checkpoint, vae: files to use instead of the recorded paths; their SHA-256 must match.

    Raises:
        GtrError: a named file is not the one that the bundle was built from.
    """
    source = bundle.manifest.source
    paths: dict[str, Path | None] = {"checkpoint": checkpoint, "vae": vae}
    for name, recorded in (("checkpoint", source.checkpoint), ("vae", source.vae)):
        given = paths[name]
        if recorded is None:
            paths[name] = None
            continue
        candidate = given or _recorded_path(bundle, name, Path(recorded.path))
        if not candidate.is_file():
            return None, f"the {name} it was built from ({recorded.path}) is not here; give it with --{name}"
        if (found := file_sha256(candidate)) != recorded.sha256:
            line = f"{candidate} has sha256 {found[:12]}…, the bundle was built from {recorded.sha256[:12]}…"
            if given is not None:
                raise GtrError(line)
            return None, line
        paths[name] = candidate
    return Weights(bundle.architecture, paths["checkpoint"], paths["vae"], source.random_weights, reporter), ""


def _recorded_path(bundle: Bundle, name: str, path: Path) -> Path:
    """The recorded path, or the package's own weights where the bundle came from another installation."""
    entry = MODELS.get(bundle.architecture.name)
    if not path.is_file() and name == "checkpoint" and entry is not None and entry.shipped is not None:
        return entry.shipped
    return path
