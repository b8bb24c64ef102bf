"""Which weights a build takes, and how the same ones are found again for verification.

Importing this module does not import torch; weights are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.bundle.reader import Bundle
from ...runtime.bundle.source import Source, WeightsFile
from ...runtime.commands.console import Reporter
from ...runtime.errors import GtrError, UsageError, printable
from ...runtime.files import cache_dir
from ...runtime.models.architecture import Architecture
from ..zoo import MODELS, published
from .digests import file_sha256, known_file, weights_sha256
from .download import find_or_download
from .files import read_start, weights_file
from .request import BuildRequest

if TYPE_CHECKING:
    from torch import Tensor

    from .checkpoints import Taken

RANDOM_SEED = 0


@dataclass
class Weights:
    """The weights of one build.

    Attributes:
        checkpoint_path, vae_path: files; None for random weights, or where the model has no VAE.
        random_seed: set where the checkpoint is random.
        wanted: which weights of the checkpoint; ``auto`` is EMA where the file has it.
    """

    architecture: Architecture
    checkpoint_path: Path | None
    vae_path: Path | None
    random_seed: int | None
    reporter: Reporter
    wanted: str = "auto"
    _loaded: dict[str, Taken] = field(default_factory=dict)

    def identity(self, source: str) -> str:
        """What a stage's hash contains: a file's SHA-256 and what is wanted of it, or the seed of random weights."""
        path = self.checkpoint_path if source == "checkpoint" else self.vae_path
        if path is not None:
            choice = f" {self.wanted}" if source == "checkpoint" and self.wanted != "auto" else ""
            return weights_sha256(path) + choice
        if self.random_seed is None or (source == "vae" and not self.architecture.decoder.has_weights):
            return "none"
        return f"random:{self.random_seed}"

    def checkpoint(self) -> Mapping[str, Tensor]:
        """MAR's state dict in the official layout, read once.

        Raises:
            GtrError: the file is not this model's checkpoint.
        """
        return self._take("checkpoint").weights

    def vae(self) -> Mapping[str, Tensor]:
        """The VAE decoder's state dict; empty where the model has none."""
        return self._take("vae").weights

    @property
    def warning(self) -> str:
        """What is wrong with the checkpoint's weights, in a line; empty for nothing, or before they were read."""
        return self._loaded["checkpoint"].warning if "checkpoint" in self._loaded else ""

    def source(self, stages: Mapping[str, str]) -> Source:
        """The manifest's ``source`` section, with the keys of these stages. Reads what was not read yet."""
        return Source(self._file("checkpoint"), self._file("vae"), self.random_seed, stages, None)

    def _take(self, name: str) -> Taken:
        if name not in self._loaded:
            from . import checkpoints, vae

            if name == "vae" and not self.architecture.decoder.has_weights:
                taken = checkpoints.Taken({})
            elif name == "vae" and self.vae_path is not None:
                taken = vae.load_vae_decoder(self.vae_path, self.architecture)
            elif name == "checkpoint" and self.checkpoint_path is not None:
                taken = checkpoints.load_mar(self.checkpoint_path, self.architecture, self.wanted)
                self._report(taken, self.checkpoint_path)
            else:
                make = vae.random_vae_decoder if name == "vae" else checkpoints.random_mar
                taken = checkpoints.Taken(make(self.architecture, self.random_seed or 0))
            self._loaded[name] = taken
        return self._loaded[name]

    def _report(self, taken: Taken, path: Path) -> None:
        if self._is_shipped(path):
            self.reporter.say(f"weights: EMA, of {path}")
            return
        named = published(self.architecture.name, "checkpoint", weights_sha256(path))
        unknown = taken.found is not None and taken.found.weights == "unknown"
        said = "; nothing in it says whether these are EMA weights, which make better pictures" if unknown else ""
        self.reporter.say(f"weights: {taken.found} of {path}{named and f', {named}'}{said}")
        if taken.warning:
            self.reporter.say(taken.warning)

    def _is_shipped(self, path: Path) -> bool:
        """The package's own file is bare; its card says that it holds EMA weights (export/data/mar_digits.md)."""
        entry = MODELS.get(self.architecture.name)
        return entry is not None and entry.shipped == path

    def _file(self, name: str) -> WeightsFile | None:
        path = self.checkpoint_path if name == "checkpoint" else self.vae_path
        if path is None:
            return None
        found, shown = self._take(name).found, printable(str(path.resolve()), 1000)
        if found is None:
            raise ValueError(f"no {name} was read")  # a model without a VAE has no path of one
        kind = "ema" if self._is_shipped(path) else found.weights
        return WeightsFile(shown, weights_sha256(path), kind, found.key, found.prefix)


def resolve_weights(request: BuildRequest, reporter: Reporter) -> Weights:
    """Finds the files: named ones, the package's own, the cache, the original project's folders, then the network.

    Raises:
        UsageError: a named file does not exist.
        GtrError: nothing was found and nothing can be downloaded.
    """
    entry, name, checkpoint, vae = request.entry(), request.name, request.checkpoint, request.vae
    for option, path in (("--checkpoint", checkpoint), ("--vae", vae)):
        if path is not None and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{option} {path} is not a file")
    checkpoint, vae = (path and weights_file(path) for path in (checkpoint, vae))
    for path in (checkpoint, vae):
        if path is not None:
            read_start(path)  # what is plainly no weights shows before the long part, not in the middle of it
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
    return Weights(entry.architecture, checkpoint, vae, None, reporter, request.weights)


def weights_of_bundle(
    bundle: Bundle, checkpoint: Path | None, vae: Path | None, reporter: Reporter
) -> tuple[Weights | None, str]:
    """The weights that a bundle was built from, if they can be found again; else None and why.

    Args:
        bundle: its manifest has the SHA-256 of the files, and which weights of them were taken; the paths that it names
            are never opened.
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
        elif not (given.is_file() or given.is_dir()):
            raise UsageError(f"--{name} {given} is not a file")
        elif (found := weights_sha256(weights_file(given))) != recorded.sha256:
            raise GtrError(f"{given} has sha256 {found[:12]}…, the bundle was built from {recorded.sha256[:12]}…")
        else:
            paths[name] = weights_file(given)
    taken, files = source.checkpoint, (paths["checkpoint"], paths["vae"])
    # Where the file's top was taken as it was, there is nothing to choose from.
    wanted = taken.weights if taken and taken.weights != "unknown" and (taken.key or taken.prefix) else "auto"
    return Weights(bundle.architecture, *files, source.random_weights, reporter, wanted), ""


def described(model: str, name: str, file: WeightsFile) -> str:
    """A file of the manifest for people: what was taken, from where, and whether that is a published file."""
    kind = {"ema": "EMA", "model": "the model's own, not EMA", "unknown": "EMA or not is unknown"}[file.weights]
    places = f"{file.key or 'top of the file'}{f', without the prefix {file.prefix}' if file.prefix else ''}"
    kind = f"{kind} ({places}); " if name == "checkpoint" else ""
    known = published(model, name, file.sha256)
    return f"{kind}{file.path} (sha256 {file.sha256[:12]}…{known and f', {known}'})"


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
