"""gtr-export build: the stages in order, each cached by the hash of what it depends on.

A build writes into ``<out>.partial`` and swaps it in when it is complete, so that a kill at any moment leaves the old
bundle or a folder without a manifest, which no loader accepts and the next build resumes. Importing this module does
not import torch: a build with nothing to do is quick.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from ...runtime.bundle.reader import FORMAT, MANIFEST, SCHEMA, Bundle, GraphFiles, StoredFile, data_file, stored_graph
from ...runtime.bundle.staged import lock, partial_folder, settle, swap
from ...runtime.commands.console import Reporter
from ...runtime.errors import BundleError, GtrError, UsageError
from ...runtime.files import link_or_copy, read_json, write_json
from ...runtime.models.families import graph_specs
from ...runtime.models.graphs import OPSETS, PRECISIONS, QUANTISED, GraphSpec
from ..zoo import MODELS, ModelEntry
from .sources import Weights, resolve_weights

STAGES = "stages.json"
FLOAT32_PARTS = ["layernorm", "groupnorm", "softmax", "residual", "latent_projection", "sampler"]
"""What stays float32 in a half-precision bundle; export/models/layers.py makes it so."""

#: Which weights a graph holds; the others have none.
_WEIGHTS_OF = {"backbone": "checkpoint", "diffusion_step": "checkpoint", "decoder": "vae"}


@dataclass(frozen=True)
class CalibrationChoices:
    """How int8 and fp8 are calibrated: number of images, preset to sample with, layers to keep (``auto`` or a number),
    threads of one call."""

    images: int = 64
    plan: str = "gtr"
    keep: int | str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class BuildRequest:
    """What to build; the defaults are the command's."""

    model: str
    out: Path
    checkpoint: Path | None = None
    vae: Path | None = None
    random_weights: bool = False
    precision: str = "fp32"
    max_batch: int = 8
    force: bool = False
    calibration: CalibrationChoices = CalibrationChoices()

    def entry(self) -> ModelEntry:
        """The zoo's entry.

        Raises:
            UsageError: unknown model or precision, contradicting or senseless options.
        """
        if self.model not in MODELS:
            raise UsageError(f"model {self.model!r} is not one of {', '.join(MODELS)}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.random_weights and self.checkpoint is not None:
            raise UsageError("--random-weights and --checkpoint contradict each other; give one of them")
        if not 1 <= self.max_batch <= 4096:
            raise UsageError(f"--max-batch {self.max_batch} is not in 1..4096")
        entry = MODELS[self.model]
        if self.vae is not None and entry.vae is None:
            raise UsageError(f"{self.model} has no VAE; leave --vae out")
        return entry


@dataclass
class BuildResult:
    """What a build did.

    Attributes:
        bundle: the folder.
        stages: name to ``built`` or ``cached``.
        bytes: size of the graphs.
    """

    bundle: Path
    stages: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    @property
    def unchanged(self) -> bool:
        """Nothing had to be done."""
        return all(state == "cached" for state in self.stages.values())


def build(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """Builds a bundle, or finds that it is already there.

    Raises:
        UsageError: see :meth:`BuildRequest.entry`.
        GtrError: weights are missing or wrong, the folder is in the way, or another build is writing it.
    """
    entry = request.entry()
    if request.precision in QUANTISED:
        from .quantised import build_quantised

        return build_quantised(request, reporter)
    out = request.out
    with lock(out):
        settle(out)
        old = _existing(request)
        weights = resolve_weights(
            request.model, entry, request.checkpoint, request.vae, request.random_weights, reporter
        )
        specs = graph_specs(entry.architecture, request.max_batch)
        keys = stage_keys(request, weights)
        result = BuildResult(out)
        if old is not None and not request.force and _is_current(old, request, keys, weights):
            result.stages = dict.fromkeys([*keys, "manifest"], "cached")
            result.bytes = sum(files.bytes for files in old.graphs.values())
            shutil.rmtree(partial_folder(out), ignore_errors=True)  # what an interrupted --force may have left
            return result

        partial = partial_folder(out)
        partial.mkdir(parents=True, exist_ok=True)
        if request.force:
            shutil.rmtree(partial)
            partial.mkdir()
        (partial / MANIFEST).unlink(missing_ok=True)
        finished: dict[str, Any] = {}
        previous = {} if request.force else _finished_stages(partial, old)
        for kind, spec in specs.items():
            stored = previous.get(kind)
            if stored is not None and stored["key"] == keys[kind] and _adopt(stored, partial):
                result.stages[kind] = "cached"
            else:
                with reporter.stage(f"export {kind} ({request.precision})"):
                    stored = _export(spec, request, entry, weights, partial)
                stored["key"] = keys[kind]
                result.stages[kind] = "built"
            finished[kind] = {key: stored[key] for key in ("key", "model", "data")}
            write_json(partial / STAGES, {**_without_folder(previous, finished, partial), **finished})
        manifest = _manifest(request, entry, weights, specs, finished)
        manifest["engines"] = _kept_engines(old, manifest, partial)
        result.bytes = sum(
            part["bytes"] for stage in finished.values() for part in (stage["model"], stage["data"]) if part
        )
        write_json(partial / MANIFEST, manifest)
        (partial / STAGES).unlink()
        swap(partial, out)
        result.stages["manifest"] = "built"
    return result


def default_out(model: str, precision: str, random_weights: bool) -> Path:
    """``bundles/mar-h-fp16``, or ``bundles/mar-h-random-fp16``."""
    return Path("bundles") / "-".join([model, *(["random"] if random_weights else []), precision])


# --- what a stage depends on ------------------------------------------------------------------------------------------


def stage_keys(request: BuildRequest, weights: Weights) -> dict[str, str]:
    """Graph kind to the hash of what it depends on."""
    entry = request.entry()
    specs = graph_specs(entry.architecture, request.max_batch)
    return {kind: _stage_key(spec, request, entry, weights) for kind, spec in specs.items()}


def _stage_key(spec: GraphSpec, request: BuildRequest, entry: ModelEntry, weights: Weights) -> str:
    source = _WEIGHTS_OF.get(spec.kind)
    depends = {
        "kind": spec.kind,
        "model": msgspec.to_builtins(entry.architecture),
        "precision": request.precision,
        "opset": OPSETS[request.precision],
        "contract": spec.to_json(),
        "weights": weights.identity(source) if source else None,
        "code": _code_hash(),
        "tools": tool_versions(),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _code_hash() -> str:
    """Hash of the source that decides what a graph looks like."""
    part = Path(__file__).parents[1]
    files = [part / "reference" / "networks.py", *sorted((part / "graphs").glob("*.py"))]
    files += [part.parent / "runtime" / "sampling" / name for name in ("selection.py", "diffusion.py")]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def tool_versions() -> dict[str, str]:
    """Versions that are recorded in the manifest."""
    found = {}
    for name in ("gtr-deploy", "torch", "onnx", "onnxscript"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# --- doing a stage ----------------------------------------------------------------------------------------------------


def _export(
    spec: GraphSpec, request: BuildRequest, entry: ModelEntry, weights: Weights, partial: Path
) -> dict[str, Any]:
    try:
        from ..graphs.onnx_export import export_graph
        from ..reference.networks import build_graph_module
    except ImportError as error:
        raise GtrError(f"{error.name} is not installed; pip install 'gtr-deploy[export]'") from None

    relative = f"graphs/{spec.kind}.onnx"
    path = partial / relative
    path.parent.mkdir(exist_ok=True)
    for stale in (path, data_file(path)):
        stale.unlink(missing_ok=True)
    checkpoint = weights.checkpoint() if _WEIGHTS_OF.get(spec.kind) == "checkpoint" else {}
    vae = weights.vae() if _WEIGHTS_OF.get(spec.kind) == "vae" else {}
    module = build_graph_module(spec.kind, entry.architecture, checkpoint, vae, request.precision)
    export_graph(module, spec, request.precision, path)
    return stored_graph(partial, relative)


def _manifest(
    request: BuildRequest,
    entry: ModelEntry,
    weights: Weights,
    specs: Mapping[str, GraphSpec],
    finished: Mapping[str, Any],
) -> dict[str, Any]:
    opset = OPSETS[request.precision]
    graphs = {
        kind: {"opset": opset, "model": finished[kind]["model"], "data": finished[kind]["data"], "cpu": None}
        | spec.to_json()
        for kind, spec in specs.items()
    }
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "model": msgspec.to_builtins(entry.architecture),
        "conditioning": msgspec.to_builtins(entry.model.conditioner),
        "precision": {
            "name": request.precision,
            "networks": request.precision,
            "float32": FLOAT32_PARTS if request.precision != "fp32" else ["everything"],
        },
        "graphs": graphs,
        "engines": [],
        "plan_defaults": _plan_defaults(entry, weights),
        "max_batch": request.max_batch,
        "source": {**weights.to_json(), "stages": {kind: stage["key"] for kind, stage in finished.items()}},
        "tools": tool_versions(),
        "reports": {},
    }


def _plan_defaults(entry: ModelEntry, weights: Weights) -> dict[str, Any]:
    if weights.random_seed is None:
        return entry.plan_defaults
    # Untrained weights do not predict the noise; from t=999 the reverse chain multiplies that error to 1e4 and more.
    return {**entry.plan_defaults, "max_timestep": 950}


# --- what is already there --------------------------------------------------------------------------------------------


def _existing(request: BuildRequest) -> Bundle | None:
    """The bundle at ``out``, if there is one that this build may replace."""
    out = request.out
    if not out.exists():
        return None
    if not out.is_dir():
        raise UsageError(f"{out} is a file; choose another folder with --out")
    try:
        old = Bundle.load(out)
    except BundleError as error:
        if not any(out.iterdir()):
            return None
        if (out / MANIFEST).is_file() and request.force:
            return None
        hint = "--force replaces it" if (out / MANIFEST).is_file() else "choose another folder with --out"
        raise GtrError(f"{out} is in the way ({error}); {hint}") from None
    found, wanted = (old.architecture.name, old.precision), (request.model, request.precision)
    if found != wanted and not request.force:
        difference = f"{out} holds {' '.join(found)}, this build is {' '.join(wanted)}"
        raise GtrError(f"{difference}; --force replaces it, --out puts it elsewhere")
    return old


def _is_current(old: Bundle, request: BuildRequest, keys: Mapping[str, str], weights: Weights) -> bool:
    """Same stages, same settings, and every file still there with its size."""
    manifest = old.manifest
    if manifest["source"].get("stages") != dict(keys) or old.max_batch != request.max_batch:
        return False
    if manifest["plan_defaults"] != _plan_defaults(request.entry(), weights) or manifest["tools"] != tool_versions():
        return False
    try:
        old.graph_paths(checksums=False)
    except BundleError:
        return False
    return True


def _finished_stages(partial: Path, old: Bundle | None) -> dict[str, Any]:
    """Stages that an interrupted build, or else the old bundle, has finished; each with the folder of its files."""
    stages: dict[str, Any] = {}
    if old is not None:
        keys = old.manifest["source"].get("stages", {})
        for kind, files in old.graphs.items():
            stages[kind] = {"key": keys.get(kind), "folder": old.folder, **_stored(files)}
    with_stages = partial / STAGES
    if with_stages.is_file():
        try:
            found = read_json(with_stages)
            for kind, stage in found.items():
                for name in ("model", "data"):
                    if stage[name] is not None:
                        StoredFile.from_json(stage[name], name)
                stages[kind] = {**stage, "folder": partial}
        except (BundleError, AttributeError, KeyError, TypeError):
            pass  # a damaged record only means that its stages run again
    return stages


def _stored(files: GraphFiles) -> dict[str, Any]:
    return {"model": files.model.to_json(), "data": files.data.to_json() if files.data else None}


def _kept_engines(old: Bundle | None, manifest: Mapping[str, Any], partial: Path) -> list[dict[str, Any]]:
    """Brings over the old bundle's engines that were built from the very graphs of the new one; for the manifest."""
    shutil.rmtree(partial / "engines", ignore_errors=True)  # what an interrupted build has brought over
    kept = []
    for engines in old.engine_sets if old is not None else ():
        graphs = {kind: manifest["graphs"][kind] for kind in engines.graphs}
        same = engines.precision == manifest["precision"]["name"] and all(
            (graph.onnx, graph.data)
            == (graphs[kind]["model"]["sha256"], graphs[kind]["data"] and graphs[kind]["data"]["sha256"])
            for kind, graph in engines.graphs.items()
        )
        files = {kind: {"model": graph.engine.to_json(), "data": None} for kind, graph in engines.graphs.items()}
        assert old is not None
        if same and all(_adopt({**stage, "folder": old.folder}, partial) for stage in files.values()):
            kept.append(engines.to_json())
            settings = Path("engines") / engines.key / "build.json"  # lets the next engine build find them unchanged
            if (old.folder / settings).is_file():
                shutil.copy2(old.folder / settings, partial / settings)
    return kept


def _without_folder(previous: Mapping[str, Any], finished: Mapping[str, Any], partial: Path) -> dict[str, Any]:
    """Stages of the interrupted build that this one has not come to yet stay on record."""
    kept = {kind: s for kind, s in previous.items() if kind not in finished and s["folder"] == partial}
    return {kind: {name: s[name] for name in ("key", "model", "data")} for kind, s in kept.items()}


def _adopt(stage: Mapping[str, Any], partial: Path) -> bool:
    """Brings a finished stage's files into ``partial``, by hard link from elsewhere. False if they changed."""
    try:
        for entry in (stage["model"], stage["data"]):
            if entry is None:
                continue
            stored = StoredFile.from_json(entry, "stage")
            source, target = stored.check(stage["folder"]), partial / stored.file
            if source.resolve() == target.resolve():
                continue
            link_or_copy(source, target)
    except BundleError:
        return False
    return True
