"""gtr-export build --precision int8|fp8: the fp32 and the fp16 graphs first, then their calibration.

Both bundles lie beside the wanted one while that is made, so that a kill loses no finished stage, and go away at the
end.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from ...calibration.data import calibration_images
from ...calibration.quantised_bundle import calibration_key, finished, quantise_bundle
from ...calibration.request import CalibrationRequest
from ...runtime.bundle.reader import Bundle
from ...runtime.bundle.staged import destination, lock, remove_own
from ...runtime.commands.console import Reporter
from .float_bundle import build_float, stage_keys
from .request import BuildRequest, BuildResult
from .sources import resolve_weights


def build_quantised(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """See :func:`~.build.build`; raises also what :func:`~..calibration.quantised_bundle.quantise_bundle` does."""
    entry, choices = request.entry(), request.calibration
    out = destination(request.out)
    fp32, fp16 = (out.with_name(f".{out.name}.gtr-{name}") for name in ("fp32", "fp16"))
    settings = asdict(choices)
    wanted = CalibrationRequest(fp32, out, request.precision, fp16, force=request.force, **settings)
    images = calibration_images(entry.architecture, entry.model.conditioner, choices.images)
    weights = resolve_weights(request, reporter)
    requests = [replace(request, precision=p, out=out, force=False) for p, out in (("fp32", fp32), ("fp16", fp16))]
    keys = [stage_keys(part, weights) for part in requests]
    with lock(out):
        key = calibration_key(wanted, keys, images, request.max_batch)
        report = finished(wanted, entry.architecture.name, entry.model.conditioner, key)
    stages = dict.fromkeys([*keys[0], "calibration", "manifest"], "cached")
    if report is None:
        built, _ = (build_float(part, reporter).stages for part in requests)
        result = quantise_bundle(wanted, reporter)
        stages = {**built, "calibration": result.state, "manifest": result.state}
    for source in (fp32, fp16):
        remove_own(source)
    return _result(request.out, stages)


def _result(out: Path, stages: dict[str, str]) -> BuildResult:
    bundle = Bundle.load(out)
    total = sum(files.bytes + (files.cpu.bytes if files.cpu else 0) for files in bundle.graphs.values())
    return BuildResult(out, stages, total)
