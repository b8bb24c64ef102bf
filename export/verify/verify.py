"""gtr-export verify: how far the evidence for a bundle reaches, rung by rung.

    1 loads    every file is what the manifest says, and ONNX Runtime accepts every graph
    2 finite   every graph gives finite outputs at its smallest, usual and largest shapes
    3 graphs   every graph computes what the torch modules compute, at the same shapes
    4 images   whole generations agree with the torch backend, image by image, for every preset

Rungs 1 and 2 need the bundle alone; 3 and 4 also the weights that it was built from. A bundle without a decoder ends on
rung 3, where its whole generations are compared, too. No rung says anything about picture quality or speed.
Beside them stands one warning: that a checkpoint does not bear t = 999 (respacing.py).
Tolerances are declared with the graphs (runtime/graphs.py).
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
from ...runtime.bundle.links import plain_files
from ...runtime.bundle.reader import Bundle
from ...runtime.commands.console import Reporter
from ...runtime.commands.watch import watch_calls
from ...runtime.errors import BackendError, BundleError, GtrError
from ...runtime.machine.examine import examine_machine
from ...runtime.models.families import family_of, graph_specs
from ...runtime.models.graphs import IMAGE_TOLERANCES, NETWORKS, QUANTISED, GraphSpec
from ...runtime.sampling.chains import Floats
from ...runtime.sampling.job import generation_job
from ...runtime.sampling.named import named_plan
from ...runtime.sampling.noise import SeededNoise
from ...runtime.sampling.plan import SamplingPlan, presets_of
from ..build.sources import Weights, weights_of_bundle
from .graph_inputs import covered_presets, covered_specs, graph_inputs
from .limits import graph_limit
from .report import RUNGS, Check, Report
from .respacing import measure_respacing

SIZES = ("smallest", "usual", "largest")
CPU_BUDGET = 20e12
"""FLOPs per preset and backend up to which whole generations are compared without being asked for by name."""


def verify(
    folder: Path,
    reporter: Reporter,
    checkpoint: Path | None = None,
    vae: Path | None = None,
    plans: Sequence[str] | None = None,
    images: int = 2,
    engine: str = "onnxruntime",
) -> Report:
    """Climbs the rungs. Writes nothing into the bundle; :func:`keep_report` does.

    Args:
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
        named_plan(name, bundle.architecture, bundle.plan_defaults)
    weights, why_not = weights_of_bundle(bundle, checkpoint, vae, reporter)
    if weights is not None and importlib.util.find_spec("torch") is None:
        weights, why_not = None, "torch is not installed; pip install 'gtr-deploy[export]'"
    with_what = engines.key if engines else f"{engine} cpu"
    if bundle.precision == "bf16" and engine == "onnxruntime":
        with_what += ", bfloat16 products through float32 casts"
    report = Report(bundle.architecture.name, bundle.precision, with_what, engine=engine)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        backend = _loads(bundle, engines, report, reporter, Path(scratch))
        if backend is not None:
            stack.callback(backend.close)
            specs = graph_specs(bundle.architecture, bundle.max_batch)
            if engines is None and engine != "onnxruntime":
                report.evaluated_with = backend.description
                specs = {kind: specs[kind] for kind in NETWORKS if kind in specs}
            if engines is not None:
                specs = covered_specs(specs, bundle, engines)
                plans = plans or covered_presets(bundle, engines)
            climb = _Climb(bundle, backend, specs, report, reporter)
            climb.finite()
            if weights is not None and not report.failed:
                climb.graphs(weights)
            if weights is not None and not report.failed:
                climb.images(weights, plans, images)
            if isinstance(backend, OnnxRuntimeBackend) and not report.failed:
                _respacing(backend, bundle, report, reporter, weights)
        if not bundle.architecture.decoder.makes_pictures:
            note = "not reachable without a decoder; whole latents are compared on the rung graphs"
            report.checks.append(Check("images", "all", "skipped", note=note))
        _skip_the_rest(report, why_not)
    return report


def _respacing(
    backend: OnnxRuntimeBackend, bundle: Bundle, report: Report, reporter: Reporter, weights: Weights | None
) -> None:
    """Warns of a checkpoint that does not bear t = 999. Random weights never do, and nobody wants their pictures; nor
    does an EMA that the training has hardly reached, where the cap would not help."""
    if bundle.manifest.source.random_weights is not None:
        return
    if weights is not None and weights.warning:
        report.weights_warning = weights.warning  # said when they were read
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


def _largest_error(found: Iterable[NDArray[Any]], wanted: Iterable[NDArray[Any]]) -> float:
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


def _loads(
    bundle: Bundle, engines: EngineSet | None, report: Report, reporter: Reporter, scratch: Path
) -> Backend | None:
    try:
        with reporter.stage("checksums and loading"):
            backend = TensorRTBackend(bundle, engines) if engines else _opened(bundle, report.engine, scratch)
            watch_calls(backend)
    except (BundleError, BackendError) as error:
        report.checks.append(Check("loads", "all graphs", "failed", note=str(error)))
        return None
    except ImportError as error:
        note = f"evaluating bf16 on the CPU needs {error.name}; pip install 'gtr-deploy[export]'"
        report.checks.append(Check("loads", "all graphs", "skipped", note=note))
        return None
    found: set[str] = set().union(*(graph.precisions for graph in bundle.graph_files(checksums=False).values()))
    # Half-precision graphs keep some weights in float32, quantised ones in either; float32 ones have nothing else.
    if bundle.precision not in found or (bundle.precision == "fp32" and len(found) > 1):
        note = f"the weights of its graphs are {', '.join(sorted(found)) or 'none'}, the bundle says {bundle.precision}"
        report.checks.append(Check("loads", "precision", "failed", note=note))
        return None
    if engines:
        notes = {
            kind: (f"{len(graph.profiles)} profiles", graph.engine.bytes) for kind, graph in engines.graphs.items()
        }
    else:
        kinds = [kind for kind in bundle.graphs if report.engine == "onnxruntime" or kind in NETWORKS]
        notes = {kind: (f"opset {bundle.graphs[kind].opset}", bundle.graphs[kind].bytes) for kind in kinds}
    report.checks += [
        Check("loads", kind, "ok", note=f"{what}, {size / 2**20:.1f} MiB") for kind, (what, size) in notes.items()
    ]
    return backend


def _opened(bundle: Bundle, engine: str, scratch: Path) -> Backend:
    if engine != "onnxruntime":
        return open_backend(bundle, BackendOptions(engine))
    graphs = bundle.graph_files(target="cpu")
    if bundle.precision == "bf16":
        from ..graphs.bfloat16 import widen

        widened = {}
        for kind, graph in graphs.items():
            with plain_files(graph) as plain:
                widened[kind] = widen(plain.path, scratch / plain.path.name)
        return OnnxRuntimeBackend(widened)
    return OnnxRuntimeBackend(graphs, optimised=bundle.precision != "fp8")


@dataclass
class _Climb:
    """The rungs above the first: what is checked, and what has come out so far."""

    bundle: Bundle
    backend: Backend
    specs: Mapping[str, GraphSpec]
    report: Report
    reporter: Reporter

    @property
    def references(self) -> list[str]:
        """Precisions of torch to compare with; torch has no quantised one."""
        precision = self.bundle.precision
        return ["fp32"] if precision in QUANTISED else list(dict.fromkeys([precision, "fp32"]))

    @property
    def whole(self) -> str:
        """The rung on which whole generations are compared."""
        return "images" if self.bundle.architecture.decoder.makes_pictures else "graphs"

    def inputs(self, spec: GraphSpec, size: str, seed: int) -> dict[str, NDArray[Any]]:
        """Of a graph at one of :data:`SIZES`."""
        return graph_inputs(spec, self.bundle.architecture, self.bundle.conditioner, getattr(spec, size), seed)

    def finite(self) -> None:
        for kind, spec in self.specs.items():
            with self.reporter.stage(f"finite: {kind}"):
                for size in SIZES:
                    try:
                        problem = _problem(spec, size, self.backend.run(kind, self.inputs(spec, size, 0)))
                    except BackendError as error:
                        problem = str(error)
                    shape = " ".join(f"{letter}={getattr(spec, size)[letter]}" for letter in spec.symbols)
                    status, note = ("failed", f"{shape}: {problem}") if problem else ("ok", shape)
                    self.report.checks.append(Check("finite", f"{kind}, {size}", status, note=note))

    def graphs(self, weights: Weights) -> None:
        for kind, spec in self.specs.items():
            with self.reporter.stage(f"parity: {kind}"):
                for precision in self.references:
                    module = _reference(kind, weights, precision)
                    limit, note = graph_limit(spec, self.bundle, precision, self.report.engine)
                    for size in SIZES:
                        inputs = self.inputs(spec, size, 1)
                        error = _largest_error(self.backend.run(kind, inputs), module(inputs))
                        status, subject = "ok" if error <= limit else "failed", f"{kind}, {size}, torch {precision}"
                        self.report.checks.append(Check("graphs", subject, status, error, limit, note))

    def images(self, weights: Weights, plans: Sequence[str] | None, images: int) -> None:
        architecture = self.bundle.architecture
        chosen: dict[str, SamplingPlan] = {}
        for name in plans or presets_of(family_of(architecture)):
            plan = named_plan(name, architecture, self.bundle.plan_defaults)
            if plans is None and plan.flops * images > CPU_BUDGET:
                note = f"{plan.flops * images / 1e12:.0f} TFLOP on the CPU, twice; --plans {name} runs it"
                self.report.checks.append(Check(self.whole, f"plan {name}", "skipped", note=note))
            else:
                chosen[name] = plan
        if not chosen:
            return
        from ..networks import build_networks
        from ..reference.torch_backend import TorchBackend

        made: dict[tuple[str, str], Floats | GtrError] = {}
        for precision in ["bundle", *self.references]:
            runner = self.backend
            if precision != "bundle":
                runner = TorchBackend(build_networks(architecture, weights.checkpoint(), weights.vae(), precision))
            for name, plan in chosen.items():
                with self.reporter.stage(f"{images} images, plan {name}, {runner.name} {precision}"):
                    made[precision, name] = self._generated(runner, plan, images)
        limit = IMAGE_TOLERANCES[self.bundle.precision]
        for name in chosen:
            for precision in self.references:
                pair = made["bundle", name], made[precision, name]
                self.report.checks.append(_compared(self.whole, f"plan {name}, torch {precision}", *pair, limit))

    def _generated(self, backend: Backend, plan: SamplingPlan, images: int) -> Floats | GtrError:
        architecture, conditioner, seeds = self.bundle.architecture, self.bundle.conditioner, list(range(images))
        asked = conditioner.arrays(conditioner.samples(images))
        noise = SeededNoise(seeds, architecture.token_channels)
        try:
            return backend.generate(generation_job(plan, architecture, asked, seeds, noise))
        except GtrError as error:
            return error


def _problem(spec: GraphSpec, size: str, outputs: Sequence[NDArray[Any]]) -> str:
    """What is wrong with a graph's outputs, if anything is."""
    for tensor, output in zip(spec.outputs, outputs, strict=True):
        expected = tensor.shape(getattr(spec, size))
        if output.shape != expected:
            return f"{tensor.name} is {output.shape}, expected {expected}"
        if bad := output.size - int(np.isfinite(output).sum()):
            return f"{bad} values of {tensor.name} are not finite"
    return ""


def _reference(kind: str, weights: Weights, precision: str) -> Callable[[Mapping[str, Any]], list[NDArray[Any]]]:
    import torch

    from ..families import export_family
    from ..networks import build_graph_module

    checkpoint = weights.checkpoint() if kind in export_family(weights.architecture).networks else {}
    vae = weights.vae() if kind == "decoder" else {}
    module = build_graph_module(kind, weights.architecture, checkpoint, vae, precision)

    @torch.inference_mode()
    def call(inputs: Mapping[str, Any]) -> list[NDArray[Any]]:
        outputs = module(*(torch.from_numpy(value) for value in inputs.values()))
        return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return call


def _compared(rung: str, subject: str, found: Floats | GtrError, wanted: Floats | GtrError, limit: float) -> Check:
    if isinstance(found, GtrError) or isinstance(wanted, GtrError):
        return Check(rung, subject, "failed", note=str(found if isinstance(found, GtrError) else wanted))
    worst = _largest_error(found, wanted)
    return Check(rung, subject, "ok" if worst <= limit else "failed", worst, limit, f"worst of {len(found)} images")
