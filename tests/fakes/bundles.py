"""A real bundle with engines that the fake TensorRT runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs

from fakes.machine import FakeMachine
from fakes.tensorrt import fake_engine_bytes
from gtr_deploy.runtime.backends.protocol import Backend
from gtr_deploy.runtime.bundle.manifest import EngineGraph, EngineSet, StoredFile
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.machine.examine import Gpu, Machine
from gtr_deploy.runtime.models.families import graph_specs
from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.sampling.plan import SamplingPlan, preset, resolve
from gtr_deploy.runtime.sampling.shapes import Profile, profiles

VERSIONS = {"tensorrt": "11.4.0", "tensorrt-rtx": "1.7.1.116"}


def changed(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle as if its manifest said otherwise; ``precision`` is the name. Nothing is written."""
    if "precision" in changes:
        changes["precision"] = structs.replace(bundle.manifest.precision, name=changes["precision"])
    return replace(bundle, manifest=structs.replace(bundle.manifest, **changes))


def tensor_profiles(bundle: Bundle, kind: str, ranges: Sequence[Profile]) -> list[dict[str, list[list[int]]]]:
    """Axis ranges as shapes per input tensor."""
    spec = graph_specs(bundle.architecture)[kind]
    return [
        {
            tensor.name: [list(tensor.shape({a: sizes[i] for a, sizes in profile.items()})) for i in range(3)]
            for tensor in spec.inputs
        }
        for profile in ranges
    ]


def add_fake_engines(
    folder: Path,
    flavour: str = "tensorrt",
    plans: Sequence[str | SamplingPlan] = ("gtr", "gtr-fast"),
    max_batch: int = 4,
    only: Mapping[str, Sequence[Profile]] | None = None,
    **options: Any,
) -> Bundle:
    """Writes an engine for every graph of the bundle and lists them in its manifest, as a build would.

    The decoder needs more activations than all others, as that of MAR's pictures does.
    """
    bundle = Bundle.load(folder)
    architecture, version = bundle.architecture, VERSIONS[flavour]
    resolved = [
        resolve(preset(plan, architecture, bundle.plan_defaults), architecture) if isinstance(plan, str) else plan
        for plan in plans
    ]
    ranges = {**profiles(resolved, max_batch), **(only or {})}
    for kind, spec in graph_specs(architecture, max_batch).items():
        ranges.setdefault(kind, [{a: (spec.smallest[a], spec.usual[a], spec.largest[a]) for a in spec.symbols}])
    graphs = {}
    for kind, files in bundle.graphs.items():
        relative = f"engines/{flavour}-{version}-sm90/{kind}.engine"
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = tensor_profiles(bundle, kind, ranges[kind])
        activations = 200 if kind == "decoder" else 1
        content = fake_engine_bytes(
            folder / files.model.file, shapes, flavour, version, activations=activations, **options
        )
        path.write_bytes(content)
        stored = StoredFile.of(folder, relative)
        graphs[kind] = EngineGraph(stored, *files.checksums, tuple(ranges[kind]), 0.1, {"fp32": 1})
    names = tuple(plan if isinstance(plan, str) else plan.settings.name for plan in plans)
    gpu = "Fake H100" if flavour == "tensorrt" else None
    engines = EngineSet(
        flavour, version, ("9.0",), gpu, "linux-x86_64", False, names, max_batch, bundle.precision, 3, graphs
    )
    return bundle.with_engines(engines)


def fake_host(machine: FakeMachine, index: int = 0) -> Machine:
    """What examine_machine(index) would say about it."""
    device = machine.devices[index]
    return Machine(
        "linux-x86_64", Gpu(device.name, device.compute_capability, device.memory, "13.0"), "", dict(VERSIONS), ()
    )


def pipeline_of(backend: Backend, like: Pipeline) -> Pipeline:
    """The same model on another backend."""
    return Pipeline(like.architecture, like.conditioner, backend, like.plan_defaults, like.max_batch)
