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
from ...runtime.errors import GtrError, UsageError, printable
from ...runtime.files import cache_dir
from ...runtime.models.architecture import Architecture
from ..zoo import MODELS
from .digests import file_sha256, known_file
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
    return None if path is None else WeightsFile(printable(str(path.resolve()), 1000), file_sha256(path))


def resolve_weights(request: BuildRequest, reporter: Reporter) -> Weights:
    """Finds the files: named ones, the package's own, the cache, the original project's folders, then the network.

    Raises:
        UsageError: a named file does not exist.
        GtrError: nothing was found and nothing can be downloaded.
    """
    entry, name, checkpoint, vae = request.entry(), request.name, request.checkpoint, request.vae
    for option, path in (("--checkpoint", checkpoint), ("--vae", vae)):
        if path is not None and not path.is_file():
            raise UsageError(f"{option} {path} is not a file")
    if request.random_weights:
        reporter.say("weights: random; the pictures will be noise")
        return Weights(entry.architecture, None, vae, RANDOM_SEED, reporter)
    checkpoint = checkpoint or entry.shipped
    if checkpoint is None:
        if entry.checkpoint is None:
            raise GtrError(f"{name} has no published weights; give a file with --checkpoint")
        checkpoint = find_or_download(entry.checkpoint, cached_name(name, "checkpoint"), reporter)
    if vae is None and entry.vae is not None:
        vae = find_or_download(entry.vae, cached_name(name, "vae"), reporter)
    return Weights(entry.architecture, checkpoint, vae, None, reporter)


def weights_of_bundle(
    bundle: Bundle, checkpoint: Path | None, vae: Path | None, reporter: Reporter
) -> tuple[Weights | None, str]:
    """The weights that a bundle was built from, if they can be found again; else None and why.

    Args:
        bundle: its manifest has the SHA-256 of the files; the paths that it names are never opened.
        checkpoint, vae: the files, if somebody says where they are; their SHA-256 must match.

    Raises:
        GtrError: a named file is not the one that the bundle was built from.
    """
    source = bundle.manifest.source
    paths: dict[str, Path | None] = {}
    for name, given, recorded in (("checkpoint", checkpoint, source.checkpoint), ("vae", vae, source.vae)):
        if recorded is None:
            paths[name] = None
        elif given is None:
            paths[name] = find_weights(bundle.architecture.name, name, recorded.sha256)
            if paths[name] is None:
                return None, f"the {name} it was built from ({recorded.path}) is not known here; give it with --{name}"
        elif not given.is_file():
            raise UsageError(f"--{name} {given} is not a file")
        elif (found := file_sha256(given)) != recorded.sha256:
            raise GtrError(f"{given} has sha256 {found[:12]}…, the bundle was built from {recorded.sha256[:12]}…")
        else:
            paths[name] = given
    return Weights(bundle.architecture, paths["checkpoint"], paths["vae"], source.random_weights, reporter), ""


def find_weights(model: str, name: str, digest: str) -> Path | None:
    """The file with this SHA-256: one that somebody here has built from, the package's own, or a downloaded one.

    Args:
        model: name of the model.
        name: ``checkpoint`` or ``vae``.
    """
    if (known := known_file(digest)) is not None:
        return known
    entry = MODELS.get(model)
    if entry is None:
        return None
    candidates = [entry.shipped if name == "checkpoint" else None, cache_dir() / cached_name(model, name)]
    for path in candidates:
        if path is not None and path.is_file() and file_sha256(path) == digest:
            return path
    return None


def cached_name(model: str, name: str) -> str:
    """Where a download lies in :func:`~...runtime.files.cache_dir`."""
    return f"{model}/checkpoint-last.pth" if name == "checkpoint" else "vae/kl16.ckpt"
