"""What is asked of a calibration, and its sources, read and found fit before the long part begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.bundle.reader import Bundle
from ..runtime.errors import BundleError, UsageError
from ..runtime.models.conditioning import Request
from ..runtime.models.graphs import QUANTISED
from ..runtime.sampling.named import named_plan
from ..runtime.sampling.plan import SamplingPlan
from .collect import BATCH
from .data import CalibrationImages, calibration_images
from .ranges import DEFAULT_PERCENTILE, METHODS


@dataclass(frozen=True)
class CalibrationRequest:
    """What to make; the defaults are the commands'.

    Attributes:
        source: fp32 bundle.
        out: bundle to write.
        float16: fp16 bundle of the same checkpoint. Graphs for GPUs take from it what is not quantised, attention above
            all, which is several times as fast there; without it that stays float32. Graphs for CPUs do not.
        precision: one of ``graphs.QUANTISED``.
        images: number of calibration images.
        plan: preset to sample with.
        keep: ``auto`` or a number of layers, see :func:`~.sensitivity.choose_kept`.
        method: one of ``ranges.METHODS``; :data:`METHOD_OF` if None.
        percentile: of method ``percentile``.
        requests, latents: see :func:`~.data.calibration_images`.
        batch_size: images per batch.
        compared: images that errors are measured on; their seeds count from 0.
        threads: of one call.
        force: do everything again.
    """

    source: Path
    out: Path
    precision: str = "int8"
    float16: Path | None = None
    images: int = 64
    plan: str = "gtr"
    keep: int | str = "auto"
    method: str | None = None
    percentile: float = DEFAULT_PERCENTILE
    requests: Sequence[Request] | None = None
    latents: Path | None = None
    batch_size: int = BATCH
    compared: int = 4
    threads: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Prepared:
    """A source bundle, read and found fit for quantisation."""

    bundle: Bundle
    graphs: Mapping[str, Path]
    float16: Bundle | None
    plan: SamplingPlan
    images: CalibrationImages

    def sources(self, flavour: str) -> Mapping[str, Path]:
        """The float graphs that a flavour's are written from."""
        return self.graphs if flavour == "cpu" or self.float16 is None else _plain(self.float16)


def prepare(request: CalibrationRequest) -> Prepared:
    """Checks the request before the long part.

    Raises:
        UsageError, BundleError: settings out of range, calibration data that does not fit, or a source of another
            precision than fp32.
    """
    if request.precision not in QUANTISED:
        raise UsageError(f"precision {request.precision!r} is not one of {', '.join(QUANTISED)}")
    if request.method not in (None, *METHODS):
        raise UsageError(f"calibration method {request.method!r} is not one of {', '.join(METHODS)}")
    if request.precision == "fp8" and request.method in ("mse", "entropy"):
        raise UsageError(f"calibration method {request.method} is for integers; fp8 takes max or percentile")
    if not 50 <= request.percentile <= 100:
        raise UsageError(f"percentile {request.percentile:g} is not in 50..100")
    if request.compared < 1:
        raise UsageError("no images to compare on; give at least 1")
    source = Bundle.load(request.source)
    if source.precision in QUANTISED:
        raise UsageError(f"{request.source} is quantised already ({source.precision}); start from an fp32 bundle")
    if source.precision != "fp32":
        raise UsageError(f"{request.source} is {source.precision}; calibration starts from an fp32 bundle")
    architecture = source.architecture
    plan = named_plan(request.plan, architecture, source.plan_defaults)
    images = calibration_images(
        architecture, source.conditioner, request.images, request.requests, latents=request.latents
    )
    return Prepared(source, _plain(source), _float16(request, source), plan, images)


def _plain(bundle: Bundle) -> dict[str, Path]:
    """The graphs. BundleError where a data file lies elsewhere, behind a link, which ``onnx`` does not follow."""
    graphs = bundle.graph_files()
    if linked := [graph.path for graph in graphs.values() if graph.linked]:
        raise BundleError(f"{linked[0]} has its weights behind a link; calibrate a copy: cp -rL {bundle.folder} COPY")
    return {kind: graph.path for kind, graph in graphs.items()}


def _float16(request: CalibrationRequest, source: Bundle) -> Bundle | None:
    if request.float16 is None:
        return None
    half = Bundle.load(request.float16)
    if half.precision != "fp16":
        raise UsageError(f"{request.float16} is {half.precision}; --float16 takes an fp16 bundle")
    if (half.architecture, half.manifest.source.weights) != (source.architecture, source.manifest.source.weights):
        raise UsageError(f"{request.float16} was built from other weights than {request.source}")
    if half.max_batch < source.max_batch:
        raise UsageError(
            f"{request.float16} is for batches up to {half.max_batch}, {request.source} up to {source.max_batch}"
        )
    return half
