"""The contract of every graph: names, dtypes, axes and tolerances, declared once.

Export, verification, bundles, engine profiles and backends all read these. An axis is a number where it is fixed by the
model, and a letter where it is symbolic:

    B images, G guidance branches (2 with guidance, else 1), V known tokens, P tokens to predict, R other unknown
    tokens, N rows of the diffusion head. V and R may be 0, all others are at least 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture
from .diffusion import COEFFICIENTS

Axis = int | str

PRECISIONS = ("fp32", "fp16", "bf16")

OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22}
"""ONNX opset of each precision's graphs; bfloat16 kernels and types are complete from 22 on."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy dtype name and axes of one input or output."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The axes with letters replaced by ``sizes``."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"name": self.name, "dtype": self.dtype, "axes": list(self.axes)}


@dataclass(frozen=True)
class GraphSpec:
    """One kind of graph.

    Attributes:
        kind: ``backbone``, ``diffusion_step``, ``detail_score`` or ``decoder``; also the file's stem.
        tolerances: largest relative error (norm of the difference over norm) against the torch reference of the *same*
            precision that counts as parity.
        against_fp32: the same against the fp32 reference: what the precision itself may cost.
        smallest, usual, largest: axis sizes that verification calls the graph with: the least that is allowed, a
            typical call, and the most work that a plan can ask for at the largest batch.
    """

    kind: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerances: Mapping[str, float]
    against_fp32: Mapping[str, float]
    smallest: Mapping[str, int]
    usual: Mapping[str, int]
    largest: Mapping[str, int]

    @property
    def symbols(self) -> tuple[str, ...]:
        """The letters that occur, in order of appearance."""
        found = [axis for tensor in (*self.inputs, *self.outputs) for axis in tensor.axes if isinstance(axis, str)]
        return tuple(dict.fromkeys(found))

    def to_json(self) -> dict[str, Any]:
        """The part of the contract that a manifest repeats."""
        return {
            "inputs": [tensor.to_json() for tensor in self.inputs],
            "outputs": [tensor.to_json() for tensor in self.outputs],
        }


IMAGE_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2}
"""Whole generations: relative error of the latents against the torch reference, of the same precision and of fp32. Half
precision errors are multiplied along the reverse chains, so that two correct implementations of one half-precision
network differ about as much as each differs from fp32."""


def graph_specs(architecture: Architecture, max_batch: int = 8) -> dict[str, GraphSpec]:
    """The four graphs of a MAR model, by kind, in the order they run."""
    channels, width, total = architecture.token_channels, architecture.width, architecture.tokens
    height, breadth = architecture.image_size
    rows = max_batch * total
    some = max(1, total // 8)
    known = min(3 * some, total - some)

    def real(name: str, *axes: Axis) -> TensorSpec:
        return TensorSpec(name, "float32", axes)

    def index(name: str, *axes: Axis) -> TensorSpec:
        return TensorSpec(name, "int64", axes)

    backbone = GraphSpec(
        "backbone",
        (
            real("tokens", "B", "V", channels),
            index("visible", "B", "V"),
            index("predict", "B", "P"),
            index("context", "B", "R"),
            index("labels", "G", "B"),
        ),
        (real("z", "G", "B", "P", width),),
        tolerances={"fp32": 2e-5, "fp16": 5e-3, "bf16": 4e-2},
        against_fp32={"fp32": 2e-5, "fp16": 1e-2, "bf16": 8e-2},
        smallest={"G": 1, "B": 1, "V": 0, "P": 1, "R": 0},
        usual={"G": 2, "B": 2, "V": known, "P": some, "R": total - known - some},
        largest={"G": 2, "B": max_batch, "V": total // 2, "P": total - total // 2, "R": 0},
    )
    step = GraphSpec(
        "diffusion_step",
        (
            real("x", "N", channels),
            real("z", "G", "N", width),
            index("timestep", "N"),
            real("coefficients", "N", len(COEFFICIENTS)),
            real("guidance", "N"),
            real("noise", "N", channels),
        ),
        (real("x_next", "N", channels),),
        tolerances={"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2},
        against_fp32={"fp32": 1e-5, "fp16": 1e-2, "bf16": 8e-2},
        smallest={"G": 1, "N": 1},
        usual={"G": 2, "N": 2 * some},
        largest={"G": 2, "N": rows},
    )
    detail = GraphSpec(
        "detail_score",
        (real("z", "B", "P", width),),
        (real("score", "B", "P"), real("norm", "B", "P")),
        tolerances=dict.fromkeys(PRECISIONS, 1e-5),
        against_fp32=dict.fromkeys(PRECISIONS, 1e-5),
        smallest={"B": 1, "P": 1},
        usual={"B": 2, "P": some},
        largest={"B": max_batch, "P": total - total // 2},
    )
    decoder = GraphSpec(
        "decoder",
        (real("latents", "B", total, channels),),
        (TensorSpec("image", "uint8", ("B", height, breadth, 3)),),
        tolerances={"fp32": 4e-3, "fp16": 1e-2, "bf16": 5e-2},
        against_fp32={"fp32": 4e-3, "fp16": 1e-2, "bf16": 5e-2},
        smallest={"B": 1},
        usual={"B": 1},
        largest={"B": max_batch},
    )
    return {spec.kind: spec for spec in (backbone, step, detail, decoder)}
