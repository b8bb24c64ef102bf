"""The contract of every graph: names, dtypes, axes and tolerances, declared once.

Export, verification, bundles, engine profiles and backends all read these. An axis is a number where it is fixed by the
model, and a letter where it is symbolic:

    B images, G guidance branches (2 with guidance, else 1), V known tokens, P tokens to predict, R other unknown
    tokens, N rows of the diffusion head, K tokens per image with the longer chain, M = B K of them in all, S reverse
    steps, Q = G N condition vectors, T = S Q rows of modulation. V and R may be 0, all others are at least 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from msgspec import Struct

from ..errors import printable
from .architecture import Architecture

Axis = int | str

COEFFICIENTS = (
    "sqrt_recip_alpha_bar",
    "sqrt_recipm1_alpha_bar",
    "posterior_mean_x0",
    "posterior_mean_xt",
    "posterior_log_variance",
    "log_beta",
    "noise_scale",
)
"""Columns of the diffusion step graph's ``coefficients`` input, in order (sampling/diffusion.py makes them)."""

PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")

QUANTISED: tuple[str, ...] = ("int8", "fp8")
"""Precisions that are made from float32 graphs by calibration; no torch module computes in them."""

OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20, "fp8": 20}
"""ONNX opset of each precision's graphs; bfloat16 kernels and types are complete from 22 on."""


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """Name, NumPy dtype name and axes of one input or output."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The axes with letters replaced by ``sizes``."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)


@dataclass(frozen=True)
class GraphSpec:
    """One kind of graph.

    Attributes:
        kind: one of ``NETWORKS`` or ``ROW_GRAPHS``; also the file's stem.
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


def signature(inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], dtypes: bool = True) -> str:
    """A contract on one line; float32 goes without saying."""

    def text(tensor: TensorSpec) -> str:
        dtype = f"{tensor.dtype} " if dtypes and tensor.dtype != "float32" else ""
        return f"{dtype}{tensor.name}[{','.join(str(axis) for axis in tensor.axes)}]"

    return " -> ".join(", ".join(text(tensor) for tensor in side) for side in (inputs, outputs))


Contract = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
"""Inputs and outputs."""


def contract_difference(found: Contract, expected: Contract) -> str | None:
    """The first input or output that differs, of both sides; None if the contracts are the same."""
    for side, here, there in zip(("input", "output"), found, expected, strict=True):
        for index in range(max(len(here), len(there))):
            pair = [signature(tensors[index : index + 1], ()).removesuffix(" -> ") for tensors in (here, there)]
            if pair[0] != pair[1]:
                said = [printable(text, 80) or "none" for text in pair]
                return f"{side} {index + 1} is {said[0]}, expected {said[1]}"
    return None


NETWORKS = ("backbone", "modulation", "diffusion_step", "detail_score", "decoder")
"""What every backend runs; the decoder only where the model has one."""

ROW_GRAPHS = ("select_rows", "gather_rows", "merge_rows")
"""Selection and row bookkeeping of the reconstruction stage, for backends that keep whole generations on a device;
others do the same in NumPy (selection.py, sampler.py)."""

IMAGE_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2, "int8": 8e-2, "fp8": 0.16}
"""Whole generations: relative error of the latents against the torch reference, of the same precision and of fp32. Half
precision errors are multiplied along the reverse chains, so that two correct implementations of one half-precision
network differ about as much as each differs from fp32. Of quantised ones three to four times what mar-digits measures
(docs/quantization.md); a useless calibration is at 0.8 and more."""


def masked_generator_specs(
    architecture: Architecture, max_batch: int, conditioning: tuple[TensorSpec, ...]
) -> dict[str, GraphSpec]:
    """The graphs of a masked-autoregressive model with a diffusion head, by kind: the networks in the order they run,
    then the row graphs.

    Args:
        conditioning: the backbone's inputs that say what the images are, each with the leading axis G; a model without
            any has one branch, and no guidance.
    """
    channels, width, total = architecture.token_channels, architecture.width, architecture.tokens
    height, breadth = architecture.image_size
    rows = max_batch * total
    some = max(1, total // 8)
    known = min(3 * some, total - some)

    backbone = GraphSpec(
        "backbone",
        (
            _real("tokens", "B", "V", channels),
            _index("visible", "B", "V"),
            _index("predict", "B", "P"),
            _index("context", "B", "R"),
            *conditioning,
        ),
        (_real("z", "G" if conditioning else 1, "B", "P", width),),
        tolerances={"fp32": 2e-5, "fp16": 5e-3, "bf16": 4e-2, "int8": 0.04, "fp8": 0.08},
        against_fp32={"fp32": 2e-5, "fp16": 1e-2, "bf16": 8e-2, "int8": 0.04, "fp8": 0.08},
        smallest={"G": 1, "B": 1, "V": 0, "P": 1, "R": 0},
        usual={"G": 2, "B": 2, "V": known, "P": some, "R": total - known - some},
        largest={"G": 2, "B": max_batch, "V": total // 2, "P": total - total // 2, "R": 0},
    )
    modulation = GraphSpec(
        "modulation",
        (_real("z", "Q", width), _index("row", "T"), _index("timestep", "T")),
        (_real("modulation", "T", architecture.modulation),),
        tolerances={"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2, "int8": 0.04, "fp8": 0.08},
        against_fp32={"fp32": 1e-5, "fp16": 1e-2, "bf16": 8e-2, "int8": 0.04, "fp8": 0.08},
        smallest={"Q": 1, "T": 1},
        usual={"Q": 4, "T": 4 * 10},
        largest={"Q": 2 * rows, "T": 2 * rows},
    )
    step = GraphSpec(
        "diffusion_step",
        (
            _real("x", "N", channels),
            _real("modulation", "G", "N", architecture.modulation),
            _real("coefficients", "N", len(COEFFICIENTS)),
            _real("guidance", "N"),
            _real("noise", "N", channels),
        ),
        (_real("x_next", "N", channels),),
        tolerances={"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2, "int8": 0.08, "fp8": 0.12},
        against_fp32={"fp32": 1e-5, "fp16": 1e-2, "bf16": 8e-2, "int8": 0.08, "fp8": 0.12},
        smallest={"G": 1, "N": 1},
        usual={"G": 2, "N": 2 * some},
        largest={"G": 2, "N": rows},
    )
    detail = GraphSpec(
        "detail_score",
        (_real("z", "B", "P", width),),
        (_real("score", "B", "P"), _real("norm", "B", "P")),
        tolerances=dict.fromkeys(PRECISIONS, 1e-5),
        against_fp32=dict.fromkeys(PRECISIONS, 1e-5),
        smallest={"B": 1, "P": 1},
        usual={"B": 2, "P": some},
        largest={"B": max_batch, "P": total - total // 2},
    )
    decoder = GraphSpec(
        "decoder",
        (_real("latents", "B", total, channels),),
        (TensorSpec("image", "uint8", ("B", height, breadth, 3)),),
        # Quantised bundles have the decoder in fp16 for GPUs.
        tolerances={"fp32": 4e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-2, "fp8": 1e-2},
        against_fp32={"fp32": 4e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-2, "fp8": 1e-2},
        smallest={"B": 1},
        usual={"B": 1},
        largest={"B": max_batch},
    )
    networks = [backbone, modulation, step, detail, *([decoder] if architecture.decoder.makes_pictures else [])]
    return {spec.kind: spec for spec in (*networks, *_row_graphs(architecture, max_batch))}


def _row_graphs(architecture: Architecture, max_batch: int) -> tuple[GraphSpec, GraphSpec, GraphSpec]:
    """They move numbers and compute none, so their tolerance is 0."""
    channels, width, last = architecture.token_channels, architecture.width, max(1, architecture.tokens // 2)
    table = len(COEFFICIENTS)
    exact = {"tolerances": dict.fromkeys(PRECISIONS, 0.0), "against_fp32": dict.fromkeys(PRECISIONS, 0.0)}
    some = max(1, last // 10)
    rows, longer = max_batch * last, max_batch * some
    x, x_rows = _real("x", "N", channels), _real("x_rows", "M", channels)
    select = GraphSpec(
        "select_rows",
        (
            _real("key", "B", "P"),
            _real("direction", 1),
            _index("positions", "B", "P"),
            _index("row_index", "B", "P"),
            _index("ranks", "B", "K"),
        ),
        (_index("rows", "B", "K"),),
        **exact,
        smallest={"B": 1, "P": 1, "K": 1},
        usual={"B": 2, "P": last, "K": some},
        largest={"B": max_batch, "P": last, "K": last},
    )
    gather = GraphSpec(
        "gather_rows",
        (_real("z", "G", "N", width), x, _real("noise", "S", "N", channels), _index("rows", "M")),
        (_real("z_rows", "G", "M", width), x_rows, _real("noise_rows", "S", "M", channels)),
        **exact,
        smallest={"G": 1, "N": 1, "S": 1, "M": 1},
        usual={"G": 2, "N": last, "S": 30, "M": some},
        largest={"G": 2, "N": rows, "S": 30, "M": longer},
    )
    merge = GraphSpec(
        "merge_rows",
        (
            x,
            x_rows,
            _index("rows", "M"),
            _index("row_index", "N"),
            _index("slot_index", "M"),
            _real("noise_short", "S", "N", channels),
            _real("noise_long", "S", "N", channels),
            _index("timestep_short", "S"),
            _index("timestep_long", "S"),
            _real("coefficients_short", "S", table),
            _real("coefficients_long", "S", table),
        ),
        (
            _real("x_merged", "N", channels),
            _real("noise", "S", "N", channels),
            _index("timestep", "S", "N"),
            _real("coefficients", "S", "N", table),
        ),
        **exact,
        smallest={"N": 1, "M": 1, "S": 1},
        usual={"N": last, "M": some, "S": 20},
        largest={"N": rows, "M": longer, "S": 20},
    )
    return select, gather, merge


def _real(name: str, *axes: Axis) -> TensorSpec:
    return TensorSpec(name, "float32", axes)


def _index(name: str, *axes: Axis) -> TensorSpec:
    return TensorSpec(name, "int64", axes)
