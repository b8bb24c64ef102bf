"""What each layer costs when it alone is quantised, and which layers must stay in high precision for the gate to hold.

Errors are those of the arithmetic that the flavour means: graphs for TensorRT and FP8 are evaluated without ONNX
Runtime's optimisations, because its 8-bit products saturate on CPUs without VNNI.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from ..runtime.commands.console import Reporter
from ..runtime.errors import GtrError, UsageError
from ..runtime.models.architecture import Architecture
from ..runtime.models.graphs import IMAGE_TOLERANCES
from ..runtime.sampling.chains import Floats
from ..runtime.sampling.plan import SamplingPlan
from .layers import DEFAULT_KEEP, QUANTISED_KINDS, quantisable, read_graph
from .probes import OUTPUTS, Probes, image_errors, outputs
from .quantize import quantise_graph
from .ranges import Range

GATES = {"cpu": IMAGE_TOLERANCES["int8"], "tensorrt": IMAGE_TOLERANCES["int8"], "fp8": IMAGE_TOLERANCES["fp8"]}
"""Largest median over images of the latents' relative error against the float graphs that a flavour may cost."""


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs alone.

    Attributes:
        layer: its name.
        graph: kind of the graph it is in.
        group: its kind, whatever the depth.
        multiplications: per row, as a share of all layers of its graph.
        error: relative error that quantising it alone adds to the graph's output: z, or eps at its noise level.
        image_error: median relative error of whole images; None where that was not measured.
        contribution: share of the squared image error that is put down to the layer; they add up to about 1.
    """

    layer: str
    graph: str
    group: str
    multiplications: float
    error: float
    image_error: float | None
    contribution: float


@dataclass(frozen=True)
class Kept:
    """What ``keep`` decided.

    Attributes:
        layers: names left in high precision.
        image_error: median of the images with the rest quantised.
        gate: the limit; None where a number of layers was asked for.
        why: one line for people.
    """

    layers: tuple[str, ...]
    image_error: float
    gate: float | None
    why: str


@dataclass
class Bench:
    """Quantises graphs of one model into a scratch folder and measures them against their originals."""

    architecture: Architecture
    graphs: Mapping[str, Path]
    plan: SamplingPlan
    ranges: Mapping[str, Range]
    probes: Probes
    flavour: str
    threads: int | None = None

    def __post_init__(self) -> None:
        self.layers = {kind: quantisable(read_graph(self.graphs[kind])) for kind in QUANTISED_KINDS}

    @property
    def names(self) -> list[str]:
        """Of all layers, in the order they run."""
        return [layer.name for layers in self.layers.values() for layer in layers]

    def outputs_of(self, kind: str, graphs: Mapping[str, Path]) -> list[Floats]:
        """What these graphs in place of their originals make of the recorded calls, in the flavour's own arithmetic."""
        calls = self.probes.inputs[kind]
        return outputs({**self.graphs, **graphs}, kind, calls, self.threads, optimised=self.flavour == "cpu")

    def image_errors_of(self, graphs: Mapping[str, Path]) -> NDArray[np.float64]:
        """Relative error of each whole image with these graphs in place of their originals."""
        graphs = {kind: graphs.get(kind, self.graphs[kind]) for kind in (*QUANTISED_KINDS, "detail_score")}
        backend = OnnxRuntimeBackend(graphs, self.threads, optimised=self.flavour == "cpu")
        return image_errors(self.architecture, backend, self.plan, self.probes)

    def graph_error(self, kind: str, only: Sequence[str]) -> float:
        """Relative error of z or of eps with ``only`` these layers of a graph quantised."""
        with tempfile.TemporaryDirectory(prefix="gtr-sensitivity-") as scratch:
            target = Path(scratch) / f"{kind}.onnx"
            quantise_graph(self.graphs[kind], target, self.ranges, self.flavour, only)
            return self.probes.error(OUTPUTS[kind], self.outputs_of(OUTPUTS[kind], {kind: target}))

    def image_error(self, only: Sequence[str]) -> float:
        """Median relative error of whole images with ``only`` these layers quantised."""
        with tempfile.TemporaryDirectory(prefix="gtr-sensitivity-") as scratch:
            graphs = {}
            for kind, layers in self.layers.items():
                if any(layer.name in only for layer in layers):
                    graphs[kind] = Path(scratch) / f"{kind}.onnx"
                    quantise_graph(self.graphs[kind], graphs[kind], self.ranges, self.flavour, only)
            return float(np.median(self.image_errors_of(graphs)))


def layer_costs(bench: Bench, reporter: Reporter, images: bool = False) -> list[LayerCost]:
    """Every layer alone, worst first; with ``images`` also whole images for each, which is slow."""
    total = sum(len(layers) for layers in bench.layers.values())
    costs: list[LayerCost] = []
    with reporter.bar("sensitivity", total + len(bench.layers), "layers") as bar:
        for kind, layers in bench.layers.items():
            whole = bench.image_error([layer.name for layer in layers])
            bar.advance()
            work = sum(layer.multiplications for layer in layers)
            found = []
            for layer in layers:
                alone = bench.image_error([layer.name]) if images else None
                found.append((layer, bench.graph_error(kind, [layer.name]), alone))
                bar.advance()
            squares = sum(error**2 for _, error, _ in found) or 1.0
            for layer, error, alone in found:
                share, contribution = layer.multiplications / work, whole**2 * error**2 / squares
                costs.append(LayerCost(layer.name, kind, layer.group, share, error, alone, contribution))
    everything = sum(cost.contribution for cost in costs) or 1.0
    costs = [replace(cost, contribution=cost.contribution / everything) for cost in costs]
    return sorted(costs, key=lambda cost: -cost.contribution)


def choose_kept(bench: Bench, keep: int | str, reporter: Reporter) -> tuple[Kept, list[LayerCost]]:
    """Which layers stay in high precision, besides :data:`DEFAULT_KEEP`.

    Args:
        keep: a number of layers, the worst; or ``auto``: as few as the gate needs.

    Returns:
        The decision, and the costs that it rests on (empty where the gate held at once).

    Raises:
        UsageError: a number out of range, or another word than auto.
        GtrError: the gate does not hold even if one layer alone is quantised.
    """
    names = bench.names
    fixed = [name for name in DEFAULT_KEEP if name in names]
    others = len(names) - len(fixed)

    def measured(kept: Sequence[str]) -> float:
        return bench.image_error([name for name in names if name not in kept])

    if keep != "auto":
        if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= others:
            raise UsageError(f"--keep {keep!r} is neither auto nor a number in 0..{others}")
        costs = layer_costs(bench, reporter) if keep else []
        kept = [*fixed, *_worst(costs, fixed, keep)]
        error = measured(kept)
        return Kept(tuple(kept), error, None, f"the {keep} worst layers; median image error {error:.3g}"), costs
    limit = GATES[bench.flavour]
    error = measured(fixed)
    if error <= limit:
        why = f"no more is needed: median image error {error:.3g}, gate {limit:g}"
        return Kept(tuple(fixed), error, limit, why), []
    first, costs = error, layer_costs(bench, reporter)
    order = _worst(costs, fixed, others)
    low, high, count = 0, None, 1
    results: dict[int, float] = {}
    while high is None:
        count = min(count, others - 1)
        results[count] = measured([*fixed, *order[:count]])
        if results[count] <= limit:
            high = count
        elif count == others - 1:
            raise GtrError(
                f"the gate {limit:g} does not hold with one layer quantised ({results[count]:.3g}); use fp16"
            )
        else:
            low, count = count, 2 * count
    while high - low > 1:
        middle = (low + high) // 2
        results[middle] = measured([*fixed, *order[:middle]])
        low, high = (low, middle) if results[middle] <= limit else (middle, high)
    kept, why = [*fixed, *order[:high]], f"median image error {first:.3g} -> {results[high]:.3g}, gate {limit:g}"
    return Kept(tuple(kept), results[high], limit, why), costs


def _worst(costs: Sequence[LayerCost], fixed: Sequence[str], count: int) -> list[str]:
    return [cost.layer for cost in costs if cost.layer not in fixed][:count]


def cost_rows(costs: Sequence[LayerCost]) -> list[list[str]]:
    """For a table with :data:`COST_COLUMNS`."""
    return [
        [
            cost.layer,
            f"{cost.multiplications:.1%}",
            f"{cost.error:.5f}",
            "" if cost.image_error is None else f"{cost.image_error:.4f}",
            f"{cost.contribution:.1%}",
        ]
        for cost in costs
    ]


COST_COLUMNS = ["layer", "products", "error alone", "image error", "contribution"]
