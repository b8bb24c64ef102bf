"""Bundles of the precisions that PyTorch computes in: one exported graph after the other, each a stage.

Importing this module does not import torch: a build with nothing to do is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw

from ...runtime.bundle.manifest import (
    FORMAT,
    SCHEMA,
    EngineSet,
    GraphEntry,
    GraphFiles,
    Manifest,
    PlanDefaults,
    Precision,
    data_file,
)
from ...runtime.bundle.reader import Bundle
from ...runtime.bundle.staged import RECORD, Stage, StagedFolder, destination, lock, replaceable, stage_key, take
from ...runtime.commands.console import Reporter
from ...runtime.errors import BundleError, GtrError
from ...runtime.files import link_or_copy
from ...runtime.models.families import graph_specs
from ...runtime.models.graphs import OPSETS, GraphSpec, signature
from ..zoo import ModelEntry
from .request import BuildRequest, BuildResult
from .sources import Weights, resolve_weights

FLOAT32_PARTS = ("layernorm", "groupnorm", "softmax", "residual", "latent_projection", "sampler")
"""What stays float32 in a half-precision bundle; export/graphs/layers.py makes it so."""

STAGE_VERSIONS = {
    "backbone": 2, "modulation": 1, "diffusion_step": 3, "detail_score": 2, "decoder": 2,
    "select_rows": 2, "gather_rows": 2, "merge_rows": 2,
}  # fmt: skip
"""Raise a graph's number when what is exported computes something else, or the same in another way that people should
get: a change in export/graphs, in export/networks.py, or in the parts of runtime/sampling that they use. Its
graph is then exported again in every bundle. Names, axes, model sizes and weights are part of a stage's key anyway."""

#: Which weights a graph holds; the others have none.
_WEIGHTS_OF = {"backbone": "checkpoint", "modulation": "checkpoint", "diffusion_step": "checkpoint", "decoder": "vae"}


def build_float(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """See :func:`~.build.build`."""
    entry, out = request.entry(), destination(request.out)
    with lock(out):
        old = replaceable(out, entry.architecture.name, request.precision, request.force)
        weights = resolve_weights(request, reporter)
        specs = graph_specs(entry.architecture, request.max_batch)
        keys = stage_keys(request, weights)
        folder = StagedFolder(out, request.force)
        result = BuildResult(request.out)
        if old is not None and not request.force and _is_current(old, request, keys, weights):
            folder.discard()
            result.stages = dict.fromkeys([*keys, "manifest"], "cached")
            result.bytes = sum(files.bytes for files in old.graphs.values())
            return result
        if weights.vae_path is not None:
            weights.vae()  # one of other latents shows before the long part, not at its end
        graphs: dict[str, GraphEntry] = {}
        for kind, spec in specs.items():
            stage = folder.adopt(kind, keys[kind])
            result.stages[kind] = "built" if stage is None else "cached"
            if stage is None:
                with reporter.stage(f"export {kind} ({request.precision})"):
                    exported = _export(spec, request, entry, weights, folder.partial)
                stage = folder.keep(kind, Stage(keys[kind], exported.files))
            model, *data = stage.files
            opset = OPSETS[request.precision]
            graphs[kind] = GraphEntry(model, data[0] if data else None, opset, None, spec.inputs, spec.outputs)
        float32 = ("everything",) if request.precision == "fp32" else FLOAT32_PARTS
        manifest = Manifest(
            format=FORMAT,
            schema=SCHEMA,
            model=Raw(msgspec.json.encode(entry.architecture)),
            conditioning=Raw(msgspec.json.encode(entry.model.conditioner)),
            precision=Precision(request.precision, request.precision, float32, ()),
            graphs=graphs,
            engines=_kept_engines(old, request.precision, graphs, folder.partial),
            plan_defaults=PlanDefaults(**_plan_defaults(request, weights)),
            max_batch=request.max_batch,
            source=weights.source(keys),
            tools=tool_versions(),
            reports={},
        )
        folder.publish(manifest)
        result.bytes = sum(files.bytes for files in graphs.values())
        result.stages["manifest"] = "built"
    return result


def stage_keys(request: BuildRequest, weights: Weights) -> dict[str, str]:
    """Graph kind to the hash of what it depends on."""
    architecture = request.entry().architecture
    return {
        kind: stage_key(
            kind=kind,
            version=STAGE_VERSIONS[kind],
            model=msgspec.to_builtins(architecture),
            precision=request.precision,
            opset=OPSETS[request.precision],
            contract=signature(spec.inputs, spec.outputs),
            weights=weights.identity(_WEIGHTS_OF[kind]) if kind in _WEIGHTS_OF else None,
            tools=tool_versions(),
        )
        for kind, spec in graph_specs(architecture, request.max_batch).items()
    }


def tool_versions() -> dict[str, str]:
    """Versions that are recorded in the manifest."""
    found = {}
    for name in ("gtr-deploy", "torch", "onnx", "onnxscript"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _export(spec: GraphSpec, request: BuildRequest, entry: ModelEntry, weights: Weights, partial: Path) -> GraphFiles:
    try:
        from ..graphs.onnx_export import export_graph
        from ..networks import build_graph_module
    except ImportError as error:
        raise GtrError(f"{error.name} is not installed; pip install 'gtr-deploy[export]'") from None

    relative = f"graphs/{spec.kind}.onnx"
    path = partial / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in (path, data_file(path)):
        stale.unlink(missing_ok=True)
    checkpoint = weights.checkpoint() if _WEIGHTS_OF.get(spec.kind) == "checkpoint" else {}
    vae = weights.vae() if _WEIGHTS_OF.get(spec.kind) == "vae" else {}
    module = build_graph_module(spec.kind, entry.architecture, checkpoint, vae, request.precision)
    export_graph(module, spec, request.precision, path)
    return GraphFiles.of(partial, relative)


def _plan_defaults(request: BuildRequest, weights: Weights) -> dict[str, Any]:
    defaults = request.entry().plan_defaults
    if weights.random_seed is None:
        return defaults
    # Untrained weights do not predict the noise; from t=999 the reverse chain multiplies that error to 1e4 and more.
    return {**defaults, "max_timestep": 950, **request.plan_defaults}


def _is_current(old: Bundle, request: BuildRequest, keys: Mapping[str, str], weights: Weights) -> bool:
    """Same stages, same settings, and every file still there with its size."""
    manifest = old.manifest
    if manifest.source.stages != keys or manifest.max_batch != request.max_batch:
        return False
    entry = request.entry()
    if old.conditioner != entry.model.conditioner:
        return False
    if old.plan_defaults != _plan_defaults(request, weights) or manifest.tools != tool_versions():
        return False
    try:
        old.graph_paths(checksums=False)
    except BundleError:
        return False
    return True


def _kept_engines(
    old: Bundle | None, precision: str, graphs: Mapping[str, GraphFiles], partial: Path
) -> tuple[EngineSet, ...]:
    """Brings over the old bundle's engines that were built from the very graphs of the new one."""
    if old is None:
        return ()
    kept = []
    for engines in old.engine_sets:
        same = engines.precision == precision and all(
            kind in graphs and (graph.onnx, graph.data) == graphs[kind].checksums
            for kind, graph in engines.graphs.items()
        )
        if same and all(take(graph.engine, old.folder, partial) for graph in engines.graphs.values()):
            kept.append(engines)
            record = Path("engines") / engines.key / RECORD  # lets the next engine build find them unchanged
            if (old.folder / record).is_file():
                link_or_copy(old.folder / record, partial / record)
    return tuple(kept)
