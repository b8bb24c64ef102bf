"""Bundles to measure: untrained weights, and an int8 bundle whose activation ranges are arbitrary.

Speed depends neither on the weights nor on the ranges, so both can be made in a minute where a checkpoint and a
calibration take hours. Never use them for pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gtr_deploy.calibration.layers import DEFAULT_KEEP, QUANTISED_KINDS, quantisable, read_graph
from gtr_deploy.calibration.quantised_bundle import FLAVOURS_OF
from gtr_deploy.calibration.quantize import quantise_graph
from gtr_deploy.calibration.ranges import Range
from gtr_deploy.runtime import Bundle, BundleError, UsageError
from gtr_deploy.runtime.bundle.reader import MANIFEST, stored_graph
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.files import link_or_copy, write_json

RANGE = Range(-4.0, 4.0)
"""Of every activation; what passes a LayerNorm mostly lies inside."""

RANDOM_MODELS = ("mar-b", "mar-l", "mar-h")
"""Built with random weights; mar-digits ships with real ones."""


def make_bundles(model: str, folder: Path, reporter: Reporter, precisions: Sequence[str] = ("fp32", "int8")) -> None:
    """Builds ``folder/<model>-<precision>``, those that are not there yet.

    Args:
        model: mar-digits, mar-b, mar-l or mar-h; all but the first get random weights.
        folder: made if it is missing.
        precisions: int8 comes from the fp32 bundle, which is built in any case.
    """
    from gtr_deploy.export.build.build import BuildRequest, build

    source = folder / f"{model}-fp32"
    if not (source / MANIFEST).is_file():
        build(BuildRequest(model, source, precision="fp32", random_weights=model in RANDOM_MODELS), reporter)
    for precision in precisions:
        out = folder / f"{model}-{precision}"
        if (out / MANIFEST).is_file():
            continue
        if precision == "int8":
            with reporter.stage(f"int8 graphs of {model} with arbitrary ranges"):
                write_int8(source, out)
        else:
            build(BuildRequest(model, out, precision=precision, random_weights=model in RANDOM_MODELS), reporter)


def write_int8(source: Path, out: Path) -> None:
    """An int8 bundle of the layers that ``gtr-export calibrate`` quantises by default, without its calibration.

    Args:
        source: fp32 bundle.
        out: folder to write; the manifest comes last, so that an interrupted run leaves no bundle.

    Raises:
        BundleError, UsageError: ``source`` is no fp32 bundle.
    """
    bundle = Bundle.load(source)
    if bundle.precision != "fp32":
        raise UsageError(f"{source} is {bundle.precision}; int8 graphs are made from an fp32 bundle")
    graphs = bundle.graph_paths()
    entries: dict[str, dict[str, Any]] = {kind: dict(entry) for kind, entry in bundle.manifest["graphs"].items()}
    kept: list[str] = []
    for kind in QUANTISED_KINDS:
        layers = [layer.name for layer in quantisable(read_graph(graphs[kind]))]
        keep = [name for name in DEFAULT_KEEP if name in layers]
        kept += keep
        for flavour in FLAVOURS_OF["int8"]:
            relative = f"graphs/cpu/{kind}.onnx" if flavour == "cpu" else f"graphs/{kind}.onnx"
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            quantise_graph(graphs[kind], out / relative, dict.fromkeys(layers, RANGE), flavour, keep)
            stored = stored_graph(out, relative)
            entries[kind].update({"cpu": stored} if flavour == "cpu" else stored)
    for kind, files in bundle.graphs.items():
        if kind not in QUANTISED_KINDS:
            entries[kind]["cpu"] = None
            for stored in (files.model, files.data):
                if stored is not None:
                    link_or_copy(bundle.folder / stored.file, out / stored.file)
    manifest = {
        **bundle.manifest,
        "precision": {
            "name": "int8",
            "networks": "int8 products with constant weights; ranges are arbitrary, for measuring speed only",
            "float32": ["all else", "attention products", *kept],
        },
        "graphs": entries,
        "engines": [],
        "source": {**bundle.manifest["source"], "calibration": "none: arbitrary ranges"},
        "tools": {**bundle.manifest["tools"], "onnx": version("onnx"), "onnxruntime": version("onnxruntime")},
        "reports": {},
    }
    write_json(out / MANIFEST, json.loads(json.dumps(manifest)))
    Bundle.load(out)


def load_bundles(folders: Sequence[Path]) -> list[Bundle]:
    """The bundles, each model and precision once.

    Raises:
        BundleError: a folder is no bundle.
        UsageError: two bundles of one model and precision.
    """
    found: dict[tuple[str, str], Bundle] = {}
    for folder in folders:
        bundle = Bundle.load(folder)
        key = (bundle.architecture.name, bundle.precision)
        if key in found:
            raise UsageError(f"{found[key].folder} and {folder} are both {' '.join(key)}; name one of them")
        found[key] = bundle
    if not found:
        raise BundleError("no bundles; name their folders, or let --make MODEL build them")
    return list(found.values())
