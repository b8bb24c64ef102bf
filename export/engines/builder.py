"""gtr-export engine: TensorRT and TensorRT-RTX engines of all graphs of one bundle. Needs neither torch nor onnx.

Networks are strongly typed: the precision is the graph's, and there is no precision switch. Engines are built beside
the old ones and listed in the manifest at the end: a kill at any moment leaves a bundle whose listed engines are whole,
and the next build resumes at the first unfinished one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msgspec import structs

from ...runtime.bundle.manifest import EngineGraph, EngineSet, StoredFile
from ...runtime.bundle.reader import Bundle
from ...runtime.bundle.staged import Stage, StagedFolder, lock, stage_key
from ...runtime.commands.console import Reporter
from ...runtime.errors import GtrError, PlanError, UsageError
from ...runtime.files import inside
from ...runtime.machine.examine import Machine, examine_machine
from ...runtime.models.architecture import Architecture
from ...runtime.models.families import graph_specs
from ...runtime.models.graphs import GraphSpec
from ...runtime.sampling.named import named_plan
from ...runtime.sampling.plan import SamplingPlan
from ...runtime.sampling.shapes import Profile, described, profiles
from .audit import counted, float32_problem
from .graph import BuildSettings, build_graph, own_precision
from .target import Target, choose_target

BUILDER_FLAGS = 2
"""Raised whenever other flags than before are given to the builder: engines of before are then built again."""

OTHER_GPUS = (
    "engines for every GPU from compute capability 8.0 on have given zeros on another GPU than the one that built them "
    "(pytorch/TensorRT #4481); run `gtr-export verify {bundle} --backend tensorrt` there first"
)


@dataclass(frozen=True)
class EngineRequest:
    """What to build; the defaults are the command's.

    Attributes:
        flavour: a key of ``FLAVOURS``.
        compute_capabilities: for TensorRT-RTX; empty for the GPU that is here, else for all usual ones.
        max_batch: largest batch of the profiles; the bundle's if None.
        plans: presets, or files as ``gtr-run plan --json`` writes them; their shapes are what the profiles cover.
        workspace_gb: largest scratch memory of a kernel, 10^9 bytes; the library's default if None.
        optimization_level: of the builder, 0 to 5.
        hardware_compatible: TensorRT only: also for other GPUs from compute capability 8.0 on.
        strict: an engine that mostly runs in float32 although its graph should not is an error, not a warning.
        force: build what is already there.
    """

    bundle: Path
    flavour: str
    compute_capabilities: tuple[str, ...] = ()
    max_batch: int | None = None
    plans: tuple[str, ...] = ("gtr",)
    workspace_gb: float | None = None
    optimization_level: int = 3
    hardware_compatible: bool = False
    strict: bool = False
    force: bool = False


@dataclass
class EngineResult:
    """What a build did; ``built`` and ``cached`` are graph kinds, warnings one line each."""

    engines: EngineSet
    bundle: Path
    built: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def build_engines(request: EngineRequest, reporter: Reporter, machine: Machine | None = None) -> EngineResult:
    """Builds an engine of every graph, or finds that it is already there, and lists them in the manifest.

    Raises:
        UsageError: an option is out of range, contradicts another, or names an unknown plan or compute capability.
        GtrError: TensorRT without a GPU, another build at work, or an engine in the wrong precision with ``strict``.
        BackendError: a library is missing, or refuses a graph.
        BundleError: the bundle is not sound.
    """
    start = time.monotonic()
    machine = machine or examine_machine()
    target = request_target(request, machine)
    with lock(request.bundle.resolve()):
        bundle = Bundle.load(request.bundle)
        max_batch = request.max_batch or bundle.max_batch
        if max_batch > bundle.max_batch:
            raise UsageError(
                f"--max-batch {max_batch}: the bundle promises {bundle.max_batch}; "
                "gtr-export build --max-batch raises it"
            )
        plans = engine_plans(request.plans, bundle.architecture, bundle.plan_defaults)
        specs = graph_specs(bundle.architecture, max_batch)
        wanted = engine_profiles(plans.values(), specs, max_batch)
        files = bundle.graph_files()
        engines = EngineSet(
            target.flavour, target.version, target.compute_capabilities, target.gpu, target.system,
            target.hardware_compatible, tuple(plans), max_batch, bundle.precision, request.optimization_level, {},
        )  # fmt: skip
        capabilities = ", ".join(target.compute_capabilities)
        reporter.say(
            f"{engines.key}: for compute capability {capabilities}; plans {', '.join(plans)}; batch up to {max_batch}"
        )
        settings = BuildSettings(bundle.precision, request.workspace_gb, request.optimization_level)
        folder = StagedFolder(inside(bundle.folder, f"engines/{engines.key}"), request.force)
        result = EngineResult(engines, request.bundle)
        if target.hardware_compatible:
            result.warnings.append(OTHER_GPUS.format(bundle=request.bundle))
        graphs: dict[str, EngineGraph] = {}
        for kind, spec in specs.items():
            key = stage_key(
                graph=bundle.graphs[kind].checksums,
                profiles=wanted[kind],
                settings=[asdict(settings), BUILDER_FLAGS],
                target=[target.build_gpu, target.system, target.hardware_compatible],
            )
            stage = folder.adopt(kind, key)
            if stage is not None:
                result.cached.append(kind)
                reporter.say(f"{kind}: cached, {stage.files[0].bytes / 1e6:.1f} MB, {counted(stage.counts)}")
            else:
                for sizes in wanted[kind]:
                    reporter.say(f"{kind}: profile {described(sizes)}")
                out = folder.partial / f"{kind}.engine"
                built = build_graph(files[kind], spec, wanted[kind], target, settings, out, reporter)
                stored = StoredFile.of(folder.partial, out.name)
                stage = folder.keep(kind, Stage(key, (stored,), round(built.seconds, 3), built.audit.layers))
                result.built.append(kind)
                result.warnings += built.warnings
                reporter.say(f"{kind}: {stored.bytes / 1e6:.1f} MB, {built.seconds:.1f} s, {built.audit.line()}")
            if problem := float32_problem(stage.counts, own_precision(spec, bundle.precision)):
                if request.strict:
                    raise GtrError(f"the {kind} engine: {problem}; without --strict this is a warning")
                result.warnings.append(f"{kind}: {problem}")
            engine = structs.replace(stage.files[0], file=f"engines/{engines.key}/{kind}.engine")
            sums = bundle.graphs[kind].checksums
            graphs[kind] = EngineGraph(engine, *sums, tuple(wanted[kind]), stage.seconds, stage.counts)
        result.engines = structs.replace(engines, graphs=graphs)
        _publish(folder, request.bundle, result)
    for warning in result.warnings:
        reporter.say(f"warning: {warning}")
    result.seconds = time.monotonic() - start
    return result


def _publish(folder: StagedFolder, bundle: Path, result: EngineResult) -> None:
    """Moves the engines to their place and lists them; writes nothing if exactly this is listed."""
    engines, fresh = result.engines, Bundle.load(bundle)  # verify may have written a report meanwhile
    if not result.built and engines in fresh.engine_sets:
        folder.discard()
        return
    # While the folders change places listed engines would have other checksums: for this moment none are listed.
    fresh = fresh.without_engines(engines.key)
    folder.publish()
    fresh.with_engines(engines)


def request_target(request: EngineRequest, machine: Machine) -> Target:
    """What the request asks to build for; raises what :func:`choose_target` does, and of a number out of range."""
    if not 0 <= request.optimization_level <= 5:
        raise UsageError(f"--optimization-level {request.optimization_level} is not in 0..5")
    if request.workspace_gb is not None and not 0 < request.workspace_gb <= 1e4:
        raise UsageError(f"--workspace {request.workspace_gb:g} is not a size in GB")
    if request.max_batch is not None and request.max_batch < 1:
        raise UsageError(f"--max-batch {request.max_batch} is not at least 1")
    again = f"`gtr-export engine {request.bundle} --engine {request.flavour}`"
    capabilities = request.compute_capabilities
    return choose_target(request.flavour, capabilities, request.hardware_compatible, machine, again)


def check_request(
    request: EngineRequest, machine: Machine, architecture: Architecture, plan_defaults: Mapping[str, Any]
) -> None:
    """Finds what is wrong with a request before its bundle is there; raises what :func:`build_engines` would."""
    engine_plans(request.plans, architecture, plan_defaults)
    request_target(request, machine)


def engine_plans(
    items: Iterable[str], architecture: Architecture, defaults: Mapping[str, Any]
) -> dict[str, SamplingPlan]:
    """Plans, resolved for one model; by what names them, files by their name.

    Raises:
        PlanError: unknown preset, or settings that do not fit the model.
        BundleError: a file is missing or not JSON.
    """
    plans = {
        Path(item).name if item.endswith(".json") else item: named_plan(item, architecture, defaults) for item in items
    }
    if not plans:
        raise PlanError("no plan to build engines for; give for example --plans gtr,mar")
    return plans


def engine_profiles(
    plans: Iterable[SamplingPlan], specs: Mapping[str, GraphSpec], max_batch: int
) -> dict[str, list[Profile]]:
    """Profiles of every graph; one that no plan uses gets the shapes that it is verified at."""
    wanted = profiles(plans, max_batch)
    for kind, spec in specs.items():
        if kind not in wanted:
            wanted[kind] = [
                {
                    letter: (low, min(max(low, spec.usual[letter]), spec.largest[letter]), spec.largest[letter])
                    for letter, low in spec.smallest.items()
                }
            ]
    return wanted
