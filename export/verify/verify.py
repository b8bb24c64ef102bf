"""gtr-export verify: how far the evidence for a bundle reaches, rung by rung.

    1 loads    every file is what the manifest says, and ONNX Runtime accepts every graph
    2 finite   every graph gives finite outputs at its smallest, usual and largest shapes
    3 graphs   every graph computes what the torch modules compute, at the same shapes
    4 images   whole generations agree with the torch backend, image by image, for every preset

Rungs 1 and 2 need the bundle alone; 3 and 4 also the weights that it was built from. No rung says anything about
picture quality or speed. Beside them stands one warning: that a checkpoint does not bear t = 999 (respacing.py).
Tolerances are declared with the graphs (runtime/graphs.py).
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.backends.choice import open_backend
from ...runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from ...runtime.backends.protocol import Backend
from ...runtime.backends.row import BackendOptions
from ...runtime.backends.tensorrt.backend import TensorRTBackend
from ...runtime.bundle.engine_sets import FLAVOURS, EngineSet, choose_engines
from ...runtime.bundle.reader import Bundle
from ...runtime.commands.console import Reporter
from ...runtime.errors import BackendError, BundleError, GtrError
from ...runtime.machine.examine import examine_machine
from ...runtime.models.families import family_of, graph_specs
from ...runtime.models.graphs import IMAGE_TOLERANCES, NETWORKS, QUANTISED, GraphSpec
from ...runtime.sampling.chains import Floats
from ...runtime.sampling.job import generation_job
from ...runtime.sampling.noise import SeededNoise
from ...runtime.sampling.plan import preset, presets_of, resolve
from ..build.sources import Weights, weights_of_bundle
from .graph_inputs import covered_presets, covered_specs, graph_inputs
from .limits import graph_limit
from .respacing import Respacing, measure_respacing

RUNGS = ("loads", "finite", "graphs", "images")
SIZES = ("smallest", "usual", "largest")
CPU_BUDGET = 20e12
"""FLOPs per preset and backend up to which whole generations are compared without being asked for by name."""


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        rung: one of ``RUNGS``.
        subject: graph, shape or plan.
        status: ``ok``, ``failed`` or ``skipped``.
        value: relative error, where there is one.
        tolerance: its limit.
        note: what else is to be said.
    """

    rung: str
    subject: str
    status: str
    value: float | None = None
    tolerance: float | None = None
    note: str = ""


@dataclass
class Report:
    """All checks of one bundle."""

    model: str
    precision: str
    evaluated_with: str
    checks: list[Check] = field(default_factory=list)
    engine: str = "onnxruntime"
    respacing: Respacing | None = None

    @property
    def file(self) -> str:
        """Its name in the bundle's reports."""
        return "parity.json" if self.engine == "onnxruntime" else f"parity-{self.engine}.json"

    @property
    def failed(self) -> bool:
        """Some check failed."""
        return any(check.status == "failed" for check in self.checks)

    @property
    def reached(self) -> str:
        """The highest rung without a failure or a gap below it; ``none`` if the bundle does not load."""
        highest = "none"
        for rung in RUNGS:
            states = [check.status for check in self.checks if check.rung == rung]
            if "ok" not in states or "failed" in states:
                break
            highest = rung
            if "skipped" in states:
                break
        return highest

    def to_json(self) -> dict[str, Any]:
        """For ``--json`` and reports/parity.json."""
        return {
            "model": self.model,
            "precision": self.precision,
            "evaluated_with": self.evaluated_with,
            "rung_reached": self.reached,
            "failed": self.failed,
            "checks": [asdict(check) for check in self.checks],
            "respacing": self.respacing.to_json() if self.respacing else None,
        }


def verify(
    folder: Path,
    reporter: Reporter,
    checkpoint: Path | None = None,
    vae: Path | None = None,
    plans: Sequence[str] | None = None,
    images: int = 2,
    engine: str = "onnxruntime",
) -> Report:
    """Climbs the rungs and writes ``reports/parity.json``, or ``parity-<engine>.json``, into the bundle.

    Args:
        folder: the bundle.
        engine: a backend's name; ``onnxruntime`` on the CPU, the bundle's engines of a flavour on the GPU.
        checkpoint, vae: the files it was built from, where they have moved.
        plans: presets to compare whole generations for; by default all that are within ``CPU_BUDGET``.
        images: images per preset.

    Raises:
        BundleError: the folder is no bundle (anything past that is a failed check).
        GtrError: a named weight file is not the bundle's.
        BackendError: none of the bundle's engines can run here.
    """
    bundle = Bundle.load(folder)
    engines = choose_engines(bundle, examine_machine(), engine) if engine in FLAVOURS else None
    for name in plans or ():
        preset(name, bundle.architecture, bundle.plan_defaults)
    weights, why_not = weights_of_bundle(bundle, checkpoint, vae, reporter)
    if weights is not None and importlib.util.find_spec("torch") is None:
        weights, why_not = None, "torch is not installed; pip install 'gtr-deploy[export]'"
    emulated = bundle.precision == "bf16" and engine == "onnxruntime"
    with_what = engines.key if engines else f"{engine} cpu"
    report = Report(
        bundle.architecture.name,
        bundle.precision,
        with_what + (", bfloat16 products through float32 casts" if emulated else ""),
        engine=engine,
    )
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        backend = _loads(bundle, engines, report, reporter, Path(scratch))
        if backend is not None:
            stack.callback(backend.close)
            specs = graph_specs(bundle.architecture, bundle.max_batch)
            if engines is None and engine != "onnxruntime":
                report.evaluated_with = backend.description
                specs = {kind: specs[kind] for kind in NETWORKS}
            if engines is not None:
                specs = covered_specs(specs, bundle, engines)
                plans = plans or covered_presets(bundle, engines)
            _finite(backend, specs, bundle, report, reporter)
            if weights is not None and not report.failed:
                _graphs(backend, specs, bundle, weights, report, reporter)
            if weights is not None and not report.failed:
                _images(backend, bundle, weights, report, reporter, plans, images)
            if isinstance(backend, OnnxRuntimeBackend) and not report.failed:
                _respacing(backend, bundle, report, reporter)
        _skip_the_rest(report, why_not)
    bundle.write_report(report.file.removesuffix(".json"), report.to_json())
    return report


def _respacing(backend: OnnxRuntimeBackend, bundle: Bundle, report: Report, reporter: Reporter) -> None:
    """Warns of a checkpoint that does not bear t = 999. Random weights never do, and nobody wants their pictures."""
    if bundle.manifest.source.random_weights is not None:
        return
    with reporter.stage("respacing: timesteps up to 999 and up to 950"):
        report.respacing = measure_respacing(backend, bundle.architecture, bundle.conditioner)
    if warning := report.respacing.warning(int(bundle.plan_defaults.get("max_timestep", 999))):
        reporter.say(f"warning: {warning}")


def _skip_the_rest(report: Report, why_not: str) -> None:
    """Rungs above a failed one, or without the weights they need, are not climbed, and say so."""
    climbed = {check.rung for check in report.checks}
    note = "a rung below it failed" if report.failed else why_not or "a rung below it was not climbed"
    report.checks += [Check(rung, "all", "skipped", note=note) for rung in RUNGS if rung not in climbed]


def relative_error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Norm of the difference over the norm, in float64; infinite for a difference from zero or a value not finite."""
    difference = np.linalg.norm(found.astype(np.float64).ravel() - wanted.astype(np.float64).ravel())
    norm = np.linalg.norm(wanted.astype(np.float64).ravel())
    if not np.isfinite(difference) or not np.isfinite(norm):
        return float("inf")
    if norm == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / norm)


def _loads(
    bundle: Bundle, engines: EngineSet | None, report: Report, reporter: Reporter, scratch: Path
) -> Backend | None:
    try:
        with reporter.stage("checksums and loading"):
            if engines is not None:
                return _engines_load(bundle, engines, report)
            backend = _opened(bundle, report.engine, scratch)
    except (BundleError, BackendError) as error:
        report.checks.append(Check("loads", "all graphs", "failed", note=str(error)))
        return None
    except ImportError as error:
        note = f"evaluating bf16 on the CPU needs {error.name}; pip install 'gtr-deploy[export]'"
        report.checks.append(Check("loads", "all graphs", "skipped", note=note))
        return None
    report.checks += [
        Check("loads", kind, "ok", note=f"opset {files.opset}, {files.bytes / 2**20:.1f} MiB")
        for kind, files in bundle.graphs.items()
        if report.engine == "onnxruntime" or kind in NETWORKS
    ]
    return backend


def _opened(bundle: Bundle, engine: str, scratch: Path) -> Backend:
    if engine != "onnxruntime":
        return open_backend(bundle, BackendOptions(engine))
    paths = bundle.graph_paths(target="cpu")
    if bundle.precision == "bf16":
        from ..graphs.bfloat16 import widen

        paths = {kind: widen(path, scratch / path.name) for kind, path in paths.items()}
    return OnnxRuntimeBackend(paths, optimised=bundle.precision != "fp8")


def _engines_load(bundle: Bundle, engines: EngineSet, report: Report) -> Backend:
    backend = TensorRTBackend(bundle, engines)
    report.checks += [
        Check("loads", kind, "ok", note=f"{len(graph.profiles)} profiles, {graph.engine.bytes / 2**20:.1f} MiB")
        for kind, graph in engines.graphs.items()
    ]
    return backend


def _shapes(spec: GraphSpec) -> list[tuple[str, Mapping[str, int]]]:
    return [(name, getattr(spec, name)) for name in SIZES]


def _finite(
    backend: Backend, specs: Mapping[str, GraphSpec], bundle: Bundle, report: Report, reporter: Reporter
) -> None:
    for kind, spec in specs.items():
        with reporter.stage(f"finite: {kind}"):
            for name, sizes in _shapes(spec):
                report.checks.append(_finite_at(backend, spec, bundle, name, sizes))


def _finite_at(backend: Backend, spec: GraphSpec, bundle: Bundle, name: str, sizes: Mapping[str, int]) -> Check:
    subject = f"{spec.kind}, {name}"
    shape = " ".join(f"{letter}={sizes[letter]}" for letter in spec.symbols)
    try:
        outputs = backend.run(spec.kind, graph_inputs(spec, bundle.architecture, bundle.conditioner, sizes))
    except BackendError as error:
        return Check("finite", subject, "failed", note=f"{shape}: {error}")
    for tensor, output in zip(spec.outputs, outputs, strict=True):
        if output.shape != tensor.shape(sizes):
            note = f"{shape}: {tensor.name} is {output.shape}, expected {tensor.shape(sizes)}"
            return Check("finite", subject, "failed", note=note)
        if not np.isfinite(output).all():
            bad = output.size - int(np.isfinite(output).sum())
            return Check("finite", subject, "failed", note=f"{shape}: {bad} values of {tensor.name} are not finite")
    return Check("finite", subject, "ok", note=shape)


def _graphs(
    backend: Backend,
    specs: Mapping[str, GraphSpec],
    bundle: Bundle,
    weights: Weights,
    report: Report,
    reporter: Reporter,
) -> None:
    precisions = _references(bundle)
    for kind, spec in specs.items():
        with reporter.stage(f"parity: {kind}"):
            for precision in precisions:
                module = _reference(kind, weights, precision)
                limit, note = graph_limit(spec, bundle, precision, report.engine)
                for name, sizes in _shapes(spec):
                    inputs = graph_inputs(spec, bundle.architecture, bundle.conditioner, sizes, seed=1)
                    error = _largest_error(backend.run(kind, inputs), module(inputs))
                    status = "ok" if error <= limit else "failed"
                    subject = f"{kind}, {name}, torch {precision}"
                    report.checks.append(Check("graphs", subject, status, error, limit, note))


def _references(bundle: Bundle) -> list[str]:
    """Precisions of torch to compare with; torch has no quantised one."""
    return ["fp32"] if bundle.precision in QUANTISED else list(dict.fromkeys([bundle.precision, "fp32"]))


def _reference(kind: str, weights: Weights, precision: str) -> Callable[[Mapping[str, Any]], list[NDArray[Any]]]:
    import torch

    from ..families import export_family
    from ..networks import build_graph_module

    checkpoint = weights.checkpoint() if kind in export_family(weights.architecture).networks else {}
    module = build_graph_module(
        kind, weights.architecture, checkpoint, weights.vae() if kind == "decoder" else {}, precision
    )

    @torch.inference_mode()
    def call(inputs: Mapping[str, Any]) -> list[NDArray[Any]]:
        outputs = module(*(torch.from_numpy(value) for value in inputs.values()))
        return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return call


def _largest_error(found: Sequence[NDArray[Any]], wanted: Sequence[NDArray[Any]]) -> float:
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


def _images(
    backend: Backend,
    bundle: Bundle,
    weights: Weights,
    report: Report,
    reporter: Reporter,
    plans: Sequence[str] | None,
    images: int,
) -> None:
    architecture = bundle.architecture
    chosen: list[str] = []
    for name in plans or presets_of(family_of(architecture)):
        plan = resolve(preset(name, architecture, bundle.plan_defaults), architecture)
        if plans is None and plan.flops * images > CPU_BUDGET:
            note = f"{plan.flops * images / 1e12:.0f} TFLOP on the CPU, twice; --plans {name} runs it"
            report.checks.append(Check("images", f"plan {name}", "skipped", note=note))
        else:
            chosen.append(name)
    if not chosen:
        return
    from ..networks import build_networks
    from ..reference.torch_backend import TorchBackend

    made: dict[tuple[str, str], Floats | GtrError] = {}
    for precision in ["bundle", *_references(bundle)]:
        runner: Backend = backend
        if precision != "bundle":
            runner = TorchBackend(build_networks(architecture, weights.checkpoint(), weights.vae(), precision))
        for name in chosen:
            with reporter.stage(
                f"{images} images, plan {name}, {runner.name} {precision.replace('onnx', '')}".rstrip()
            ):
                made[precision, name] = _generated(runner, name, bundle, images)
    limit = IMAGE_TOLERANCES[bundle.precision]
    for name in chosen:
        for precision in _references(bundle):
            report.checks.append(_compared(name, precision, made["bundle", name], made[precision, name], limit))


def _generated(backend: Backend, name: str, bundle: Bundle, images: int) -> Floats | GtrError:
    architecture = bundle.architecture
    plan = resolve(preset(name, architecture, bundle.plan_defaults), architecture)
    seeds, asked = list(range(images)), bundle.conditioner.arrays(bundle.conditioner.samples(images))
    job = generation_job(plan, architecture, asked, seeds, SeededNoise(seeds, architecture.token_channels))
    try:
        return backend.generate(job)
    except GtrError as error:
        return error


def _compared(name: str, precision: str, found: Floats | GtrError, wanted: Floats | GtrError, limit: float) -> Check:
    subject = f"plan {name}, torch {precision}"
    for side in (found, wanted):
        if isinstance(side, GtrError):
            return Check("images", subject, "failed", note=str(side))
    assert not isinstance(found, GtrError)
    assert not isinstance(wanted, GtrError)
    worst = max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))
    return Check("images", subject, "ok" if worst <= limit else "failed", worst, limit, f"worst of {len(found)} images")
