"""Makes an int8 or fp8 bundle from an fp32 one: collect, find ranges, decide what to keep, write, report.

Needs neither the checkpoint nor PyTorch. Writes into ``<out>.partial`` and swaps it in when it is complete; an
interrupted run goes on with its last finished batch, and one with nothing to do ends at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from msgspec import structs

from ..runtime.bundle.manifest import GraphFiles, Manifest, Precision, StoredFile, graph_bytes
from ..runtime.bundle.reader import Bundle
from ..runtime.bundle.staged import StagedFolder, destination, lock, replaceable, stage_key
from ..runtime.commands.console import Reporter
from ..runtime.errors import BundleError, UsageError
from ..runtime.files import link_or_copy, write_json
from ..runtime.models.conditioning import Conditioner
from .collect import STAGE_VERSIONS, Collected, collect
from .data import CalibrationImages, calibration_images
from .layers import QUANTISED_KINDS
from .probes import Probes, record
from .quantize import quantise_graph
from .ranges import Range, layer_ranges
from .request import CalibrationRequest, Prepared, prepare
from .sensitivity import Bench, Kept, choose_kept

FLAVOURS_OF = {"int8": ("tensorrt", "cpu"), "fp8": ("fp8",)}
"""The first one's graphs are the bundle's main files; ``cpu`` lies beside them."""

REPORT = "reports/calibration.json"

METHOD_OF = {"int8": "mse", "fp8": "max"}
"""Measured best on mar-digits (docs/quantization.md); E4M3 has range to spare."""


@dataclass
class CalibrationResult:
    """What a run did: ``built`` or ``cached``, and the report that is in the bundle."""

    bundle: Path
    state: str
    report: Mapping[str, Any]


def quantise_bundle(request: CalibrationRequest, reporter: Reporter) -> CalibrationResult:
    """Writes the quantised bundle with ``reports/calibration.json``, or finds that it is there.

    Raises:
        UsageError, BundleError: see :func:`prepare`.
        GtrError: the folder is in the way, another process writes it, or the gate cannot be held.
    """
    if request.out.resolve() == request.source.resolve():
        raise UsageError(f"--out {request.out} is the source itself; choose another folder")
    prepared = prepare(request)
    stages = [bundle.manifest.source.stages for bundle in (prepared.bundle, prepared.float16) if bundle]
    key = calibration_key(request, stages, prepared.images, prepared.bundle.max_batch)
    out = destination(request.out)
    with lock(out):
        model, asked = prepared.bundle.architecture.name, prepared.bundle.conditioner
        if (report := finished(request, model, asked, key)) is not None:
            return CalibrationResult(request.out, "cached", report)
        folder = StagedFolder(out, request.force)
        (folder.partial / "graphs").mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        statistics = folder.partial / "statistics.npz"
        collected = collect(
            prepared.bundle.architecture, prepared.graphs, prepared.plan, prepared.images, reporter, statistics,
            request.batch_size, request.threads,
        )  # fmt: skip
        files, report = _write(request, prepared, collected, folder.partial, reporter)
        report["seconds"] = time.monotonic() - start
        write_json(folder.partial / REPORT, report)
        folder.publish(_manifest(request, prepared, key, files, report, StoredFile.of(folder.partial, REPORT)))
    return CalibrationResult(request.out, "built", report)


def calibration_key(
    request: CalibrationRequest, stages: Sequence[Mapping[str, str]], images: CalibrationImages, max_batch: int
) -> str:
    """Hash of everything that the quantised bundle depends on.

    ``stages`` are the keys of the graphs of each source, from their manifests: float32 and, if there is one, float16.
    """
    return stage_key(
        stages=[[dict(keys) for keys in stages], max_batch],
        settings=[request.precision, request.plan, request.keep, request.method, request.percentile],
        images=[images.identity, request.batch_size, request.compared],
        versions=STAGE_VERSIONS,
        tools=[version("onnx"), _runtime_version()],
    )


def _runtime_version() -> str:
    import onnxruntime

    return onnxruntime.__version__


def finished(request: CalibrationRequest, model: str, conditioner: Conditioner, key: str) -> Mapping[str, Any] | None:
    """The report of a finished bundle of this very key, once what a killed run has left beside it is gone; None if
    there is nothing. No number depends on class names: others are written into its manifest.

    Raises:
        UsageError, GtrError: something else is in the way.
    """
    old = replaceable(destination(request.out), model, request.precision, request.force)
    if old is None or request.force or old.manifest.source.calibration != key:
        return None
    try:
        old.graph_paths(checksums=False)
        old.graph_paths(checksums=False, target="cpu")
        report = old.read_report("calibration")
    except BundleError:
        return None
    StagedFolder(old.folder).discard()
    if old.conditioner != conditioner:
        old.with_conditioner(conditioner)
    return report


def ranges_of(request: CalibrationRequest, flavour: str, collected: Collected) -> dict[str, Range]:
    """Ranges by the request's method, or the precision's own."""
    method = request.method or METHOD_OF[request.precision]
    return layer_ranges(collected.all, method, flavour != "cpu", request.percentile)


def bench_of(request: CalibrationRequest, flavour: str, reporter: Reporter) -> Bench:
    """Calibrates, and makes ready to measure; writes no bundle.

    Raises:
        UsageError, BundleError: see :func:`prepare`.
    """
    prepared = prepare(request)
    architecture, plan = prepared.bundle.architecture, prepared.plan
    collected = collect(
        architecture, prepared.graphs, plan, prepared.images, reporter, None, request.batch_size, request.threads
    )
    probes = compared_images(request, prepared)
    ranges = ranges_of(request, flavour, collected)
    return Bench(architecture, prepared.sources(flavour), plan, ranges, probes, flavour, request.threads)


def compared_images(request: CalibrationRequest, prepared: Prepared) -> Probes:
    """Float generations to measure errors on, of other seeds than calibration's."""
    architecture = prepared.bundle.architecture
    images = calibration_images(architecture, prepared.bundle.conditioner, request.compared, first_seed=0)
    return record(architecture, prepared.graphs, prepared.plan, images, request.threads)


def _write(
    request: CalibrationRequest, prepared: Prepared, collected: Collected, partial: Path, reporter: Reporter
) -> tuple[dict[str, dict[str, GraphFiles]], dict[str, Any]]:
    """The files of each graph, ``main`` and where they differ ``cpu``; and the report."""
    bundle = prepared.bundle
    with reporter.stage(f"{request.compared} images to compare with"):
        probes = compared_images(request, prepared)
    files: dict[str, dict[str, GraphFiles]] = {}
    flavours: dict[str, Any] = {}
    for flavour in FLAVOURS_OF[request.precision]:
        ranges = ranges_of(request, flavour, collected)
        sources = prepared.sources(flavour)
        bench = Bench(bundle.architecture, sources, prepared.plan, ranges, probes, flavour, request.threads)
        with reporter.stage(f"what {flavour} graphs keep in high precision"):
            kept, costs = choose_kept(bench, request.keep, reporter)
        reporter.say(f"{flavour}: kept {', '.join(kept.layers)} ({kept.why})")
        main = flavour != "cpu"
        written: dict[str, Path] = {}
        for kind in QUANTISED_KINDS:
            written[kind] = partial / "graphs" / ("" if main else "cpu") / f"{kind}.onnx"
            chosen = [layer.name for layer in bench.layers[kind] if layer.name not in kept.layers]
            quantise_graph(sources[kind], written[kind], ranges, flavour, chosen)
            stored = GraphFiles.of(partial, written[kind].relative_to(partial).as_posix())
            files.setdefault(kind, {})["main" if main else "cpu"] = stored
        flavours[flavour] = _measured(bench, kept, written, prepared.graphs)
        flavours[flavour]["costs"] = [asdict(cost) for cost in costs]
    for kind in bundle.graphs:
        if kind not in QUANTISED_KINDS:
            half = prepared.float16
            files[kind] = {"main": _taken(half or bundle, kind, partial)}
            if half is not None and half.graphs[kind].checksums != bundle.graphs[kind].checksums:
                files[kind]["cpu"] = _taken(bundle, kind, partial, "cpu/")
    return files, {
        "model": bundle.architecture.name,
        "precision": request.precision,
        "plan": prepared.plan.settings.to_json(),
        "images": len(prepared.images.seeds),
        "rest": "fp16" if prepared.float16 else "fp32",
        "own_latents": prepared.images.latents is not None,
        "method": request.method or METHOD_OF[request.precision],
        "compared_images": request.compared,
        "memory_grown": collected.grown,
        "flavours": flavours,
    }


def _taken(source: Bundle, kind: str, partial: Path, folder: str = "") -> GraphFiles:
    """A graph as it is in another bundle."""
    files = source.graphs[kind]
    for stored in files.files:
        link_or_copy(stored.check(source.folder), partial / "graphs" / folder / Path(stored.file).name)
    return GraphFiles.of(partial, f"graphs/{folder}{Path(files.model.file).name}")


def _measured(bench: Bench, kept: Kept, written: Mapping[str, Path], float32: Mapping[str, Path]) -> dict[str, Any]:
    """Errors against the float32 graphs, sizes and shares of one flavour's graphs."""
    probes, found = bench.probes, {kind: bench.outputs_of(kind, written) for kind in bench.probes.expected}
    share, sizes = {}, {}
    for kind, layers in bench.layers.items():
        done = sum(layer.multiplications for layer in layers if layer.name not in kept.layers)
        share[kind] = done / sum(layer.multiplications for layer in layers)
        sizes[kind] = {"bytes": graph_bytes(written[kind]), "fp32_bytes": graph_bytes(float32[kind])}
    return {
        "kept": list(kept.layers),
        "why": kept.why,
        "gate": kept.gate,
        "errors": {
            "z": probes.error("backbone", found["backbone"]),
            "eps": probes.error("diffusion_step", found["diffusion_step"]),
            "eps_by_timestep": {str(t): error for t, error in probes.eps_errors(found["diffusion_step"]).items()},
        },
        "image_errors": [float(error) for error in bench.image_errors_of(written)],
        "median_image_error": kept.image_error,
        "share_of_multiplications": share,
        "sizes": sizes,
    }


def _manifest(
    request: CalibrationRequest,
    prepared: Prepared,
    key: str,
    files: Mapping[str, Mapping[str, GraphFiles]],
    report: Mapping[str, Any],
    stored_report: StoredFile,
) -> Manifest:
    old, half = prepared.bundle.manifest, prepared.float16
    rest = ("all else", "attention products", *report["flavours"][FLAVOURS_OF[request.precision][0]]["kept"])
    graphs = {}
    for kind, entry in old.graphs.items():
        main = files[kind]["main"]
        graphs[kind] = structs.replace(entry, model=main.model, data=main.data, cpu=files[kind].get("cpu"))
    return structs.replace(
        old,
        precision=Precision(
            request.precision,
            f"{request.precision} products with constant weights",
            rest if half is None else half.manifest.precision.float32,
            () if half is None else rest,
        ),
        graphs=graphs,
        engines=(),
        source=structs.replace(old.source, calibration=key),
        tools={**old.tools, "onnx": version("onnx"), "onnxruntime": _runtime_version()},
        reports={"calibration": stored_report},
    )
