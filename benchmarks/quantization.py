"""Speed of int8 against fp32 on this CPU, graph by graph, in one run: calls of both take turns.

gtr-export build --model mar-b --random-weights --precision fp32 --engine onnxruntime --out bundles/mar-b
python benchmarks/quantization.py bundles/mar-b --json benchmarks/quantization.json

Speed does not depend on the activation ranges, so any do here; docs/quantization.md has what int8 costs in accuracy.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from compare_records import cpu_details

from gtr_deploy.calibration.layers import DEFAULT_KEEP, quantisable, read_graph
from gtr_deploy.calibration.quantize import quantise_graph
from gtr_deploy.calibration.ranges import Range
from gtr_deploy.runtime import Bundle
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.commands.console import Reporter, print_table
from gtr_deploy.runtime.models.graphs import graph_specs

HEAD_ROWS = (8, 16, 32, 64)
VARIANTS = ("fp32", "int8")


def cpu_name() -> str:
    """Model name, and whether it has 8-bit dot products."""
    name, flags = cpu_details()
    dots = [flag for flag in ("avx_vnni", "avx512_vnni", "amx_int8") if flag in flags]
    return f"{name} ({', '.join(dots) or 'AVX2 without VNNI' if 'avx2' in flags else '?'})"


def call_inputs(bundle: Bundle, kind: str, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Random values of the contract's shapes; positions are permutations."""
    rng = np.random.default_rng(0)
    architecture = bundle.architecture
    inputs: dict[str, np.ndarray] = {}
    for tensor in graph_specs(architecture)[kind].inputs:
        shape = tensor.shape(sizes)
        inputs[tensor.name] = (
            rng.standard_normal(shape, dtype=np.float32) if tensor.dtype == "float32" else np.zeros(shape, np.int64)
        )
    if kind == "backbone":
        order = np.stack([rng.permutation(architecture.tokens) for _ in range(sizes["B"])])
        ends = [sizes["V"], sizes["V"] + sizes["P"], sizes["V"] + sizes["P"] + sizes["R"]]
        inputs["visible"], inputs["predict"], inputs["context"], _ = np.split(order, ends, axis=1)
        inputs["labels"][-1] = architecture.null_label
    else:
        inputs["timestep"][:] = 500
    return inputs


def measure(sessions: dict[str, OnnxRuntimeBackend], kind: str, inputs: dict[str, Any], calls: int) -> dict[str, Any]:
    """Milliseconds of one call: median wall time, and least CPU time (which other processes disturb less)."""
    wall: dict[str, list[float]] = {name: [] for name in sessions}
    busy: dict[str, list[float]] = {name: [] for name in sessions}
    for backend in sessions.values():
        backend.run(kind, inputs)
    for _ in range(calls):
        for name, backend in sessions.items():
            start, start_busy = time.perf_counter(), time.process_time()
            backend.run(kind, inputs)
            wall[name].append(1e3 * (time.perf_counter() - start))
            busy[name].append(1e3 * (time.process_time() - start_busy))
    result: dict[str, Any] = {name: {"ms": statistics.median(wall[name]), "cpu_ms": min(busy[name])} for name in wall}
    result["ratio"] = result["fp32"]["ms"] / result["int8"]["ms"]
    result["cpu_ratio"] = result["fp32"]["cpu_ms"] / result["int8"]["cpu_ms"]
    return result


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--threads", default=1, show_default=True)
@click.option("--visible", default=96, show_default=True, help="Known tokens of the backbone's call.")
@click.option("--backbone-calls", default=5, show_default=True)
@click.option("--head-calls", default=40, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), help="File to write.")
def main(folder: Path, threads: int, visible: int, backbone_calls: int, head_calls: int, target: Path | None) -> None:
    """Measures an fp32 bundle against its int8 graphs for CPUs."""
    bundle, reporter = Bundle.load(folder), Reporter()
    graphs, total = bundle.graph_paths(), bundle.architecture.tokens
    report: dict[str, Any] = {"model": bundle.architecture.name, "cpu": cpu_name(), "threads": threads, "graphs": {}}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("backbone", "diffusion_step"):
            quantised = Path(scratch) / f"{kind}.onnx"
            layers = [layer.name for layer in quantisable(read_graph(graphs[kind]))]
            keep = [name for name in DEFAULT_KEEP if name in layers]
            with reporter.stage(f"quantise {kind}"):
                quantise_graph(graphs[kind], quantised, dict.fromkeys(layers, Range(-4.0, 4.0)), "cpu", keep)
            sizes = {
                name: sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*"))
                for name, path in (("fp32", graphs[kind]), ("int8", quantised))
            }
            report["graphs"][kind] = {"bytes": sizes, "size_ratio": sizes["int8"] / sizes["fp32"], "calls": []}
            paths = {"fp32": graphs[kind], "int8": quantised}
            sessions = {name: OnnxRuntimeBackend({kind: paths[name]}, threads, "cpu") for name in VARIANTS}
            predict = total // 16
            shapes = [{"G": 2, "N": n} for n in HEAD_ROWS]
            if kind == "backbone":
                shapes = [{"G": 2, "B": 4, "V": visible, "P": predict, "R": total - visible - predict}]
            for shape in shapes:
                label = " ".join(f"{axis}={size}" for axis, size in shape.items())
                with reporter.stage(f"{kind} {label}"):
                    calls = backbone_calls if kind == "backbone" else head_calls
                    found = measure(sessions, kind, call_inputs(bundle, kind, shape), calls)
                report["graphs"][kind]["calls"].append({"sizes": shape, **found})
                times = [f"{found[name]['ms']:.1f}" for name in VARIANTS]
                rows.append([kind, label, *times, f"{found['ratio']:.2f}", f"{found['cpu_ratio']:.2f}"])
    if target is not None:
        target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_table(["graph", "call", "fp32 ms", "int8 ms", "ratio", "ratio of CPU time"], rows, report["cpu"])
    for kind, found in report["graphs"].items():
        print(f"{kind}: {found['bytes']['int8'] / 1e6:.1f} MB, {found['size_ratio']:.1%} of fp32")


if __name__ == "__main__":
    main()
