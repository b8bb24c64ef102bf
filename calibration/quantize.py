"""Writes graphs with explicit Q/DQ pairs from float graphs and activation ranges.

Every quantised layer becomes ``DQ(Q(x)) @ DQ(weight)``: its own activation pair straight before the product and the
weight's DQ beside it, which is where TensorRT and ONNX Runtime fuse them. All else stays as it is. Written here and not
with onnxruntime.quantization's QDQQuantizer, which also marks outputs, needs the whole model in memory with its shapes
inferred, and has no say in where a pair goes; a test compares the two on the same ranges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from ..runtime.errors import UsageError
from .layers import Layer, quantisable, read_graph, weight_values
from .ranges import Range

EXTERNAL_DATA_BYTES = 64 * 2**20
"""Weights above this size go into one ``.data`` file beside the graph, as export/onnx_export.py does it."""

FLOAT8_LARGEST = 448.0
"""Largest E4M3FN value."""


@dataclass(frozen=True)
class Flavour:
    """How one kind of hardware wants its integers.

    Attributes:
        activation, weight: ONNX element types.
        signed: activations are symmetric around 0.
        weight_limit: largest quantised weight.
    """

    name: str
    activation: int
    weight: int
    signed: bool
    weight_limit: float


FLAVOURS = {
    # Without VNNI the CPU's u8 x s8 product adds two neighbours in int16: 2 * 255 * 64 is the most that fits, so that
    # weights of 8 bits saturate without a word. 7 bits are right on every CPU.
    "cpu": Flavour("cpu", TensorProto.UINT8, TensorProto.INT8, False, 63),
    "tensorrt": Flavour("tensorrt", TensorProto.INT8, TensorProto.INT8, True, 127),
    "fp8": Flavour("fp8", TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FN, True, FLOAT8_LARGEST),
}

_SMALLEST_SCALE = 1e-8


def activation_scale(found: Range, flavour: Flavour) -> tuple[float, int]:
    """Scale and zero point of a range.

    Symmetric: the larger end maps to 127 (or to E4M3's 448). Asymmetric: the ends, widened to hold 0, map to 0 and 255.
    """
    if flavour.signed:
        limit = FLOAT8_LARGEST if flavour.activation == TensorProto.FLOAT8E4M3FN else 127.0
        return max(max(-found.low, found.high) / limit, _SMALLEST_SCALE), 0
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    scale = max((high - low) / 255.0, _SMALLEST_SCALE)
    return scale, int(np.clip(round(-low / scale), 0, 255))


def quantised_weight(values: NDArray[np.float32], axis: int, flavour: Flavour) -> tuple[Any, NDArray[np.float32]]:
    """Per output channel, symmetric: (tensor of the flavour's type as NumPy, scales [outputs])."""
    largest = np.abs(values).max(axis=1 - axis)
    scale = np.maximum(largest / flavour.weight_limit, _SMALLEST_SCALE).astype(np.float32)
    scaled = values / np.expand_dims(scale, 1 - axis)
    if flavour.weight == TensorProto.FLOAT8E4M3FN:
        return scaled.astype(helper.tensor_dtype_to_np_dtype(flavour.weight)), scale
    limit = flavour.weight_limit
    return np.clip(np.rint(scaled), -limit, limit).astype(np.int8), scale


def quantise_graph(
    source: Path, target: Path, ranges: Mapping[str, Range], flavour: str, only: Collection[str] | None = None
) -> None:
    """Writes ``target`` (and ``target``.data where the weights are large).

    Args:
        source: float32 or float16 graph; what is not quantised stays in its precision.
        ranges: layer name to the range of its activations.
        flavour: a key of :data:`FLAVOURS`.
        only: names of the layers to quantise; others are left alone. All by default.

    Raises:
        UsageError: a graph that is quantised already, or a layer without a range.
    """
    model = read_graph(source)
    layers = [layer for layer in quantisable(model) if only is None or layer.name in only]
    missing = [layer.name for layer in layers if layer.name not in ranges]
    if missing:
        raise UsageError(f"no activation range for {missing[0]}; calibrate again, or keep it in high precision")
    _insert_pairs(model, layers, ranges, FLAVOURS[flavour], source.parent)
    load_external_data_for_model(model, str(source.parent))
    _save(model, target)


def _insert_pairs(
    model: onnx.ModelProto, layers: list[Layer], ranges: Mapping[str, Range], flavour: Flavour, folder: Path
) -> None:
    by_node = {layer.node: layer for layer in layers}
    originals = {tensor.name: tensor for tensor in model.graph.initializer}
    ranks = _ranks(model)
    flat = flavour.name == "cpu" and any(ranks.get(layer.activation) == 2 for layer in layers)
    if flat:
        model.graph.initializer.append(numpy_helper.from_array(np.array([0], dtype=np.int64), "first_axis"))
    uses = Counter(name for node in model.graph.node for name in node.input)
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(model.graph.node):
        layer = by_node.get(index)
        if layer is None:
            nodes.append(node)
            continue
        real = np.float32 if originals[layer.weight].data_type == TensorProto.FLOAT else np.float16
        scale, zero = activation_scale(ranges[layer.name], flavour)
        prefix = f"{layer.name}.input"
        model.graph.initializer.append(numpy_helper.from_array(np.array(scale, dtype=real), f"{prefix}_scale"))
        model.graph.initializer.append(helper.make_tensor(f"{prefix}_zero_point", flavour.activation, (), [zero]))
        # ONNX Runtime makes Gemm of a 2-D product and its bias before it looks for integers, and then dequantises the
        # weight in every call; with a leading axis the product stays one.
        lifted = flat and ranks.get(layer.activation) == 2
        entering = f"{prefix}_lifted" if lifted else layer.activation
        if lifted:
            nodes.append(helper.make_node("Unsqueeze", [layer.activation, "first_axis"], [entering], f"{prefix}.lift"))
        numbers = [f"{prefix}_scale", f"{prefix}_zero_point"]
        nodes.append(helper.make_node("QuantizeLinear", [entering, *numbers], [f"{prefix}_q"], f"{prefix}.q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{prefix}_q", *numbers], [f"{prefix}_dq"], f"{prefix}.dq"))
        weights, scales = quantised_weight(weight_values(model, layer.weight, folder), layer.axis, flavour)
        raw = np.ascontiguousarray(weights).tobytes()
        inputs = [f"{layer.weight}_q", f"{layer.weight}_scale", f"{layer.weight}_zero_point"]
        model.graph.initializer.append(helper.make_tensor(inputs[0], flavour.weight, weights.shape, raw, raw=True))
        model.graph.initializer.append(numpy_helper.from_array(scales.astype(real), inputs[1]))
        zeros = helper.make_tensor(inputs[2], flavour.weight, scales.shape, bytes(len(scales)), raw=True)
        model.graph.initializer.append(zeros)
        dequantised = f"{layer.weight}_dq"
        nodes.append(helper.make_node("DequantizeLinear", inputs, [dequantised], f"{layer.weight}.dq", axis=layer.axis))
        node.input[0], node.input[1] = f"{prefix}_dq", dequantised
        nodes.append(node)
        if lifted:
            result, node.output[0] = node.output[0], f"{layer.name}.output_lifted"
            nodes.append(helper.make_node("Squeeze", [node.output[0], "first_axis"], [result], f"{layer.name}.lower"))
        uses[layer.weight] -= 1
    gone = {layer.weight for layer in layers if uses[layer.weight] == 0}
    remaining = [tensor for tensor in model.graph.initializer if tensor.name not in gone]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(remaining)


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    known = (*model.graph.input, *model.graph.value_info)
    return {v.name: len(v.type.tensor_type.shape.dim) for v in known if v.type.tensor_type.HasField("shape")}


def _save(model: onnx.ModelProto, target: Path) -> None:
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = target.with_name(target.name + ".data")
    for stale in (target, data):
        stale.unlink(missing_ok=True)
    if size > EXTERNAL_DATA_BYTES:
        onnx.save(model, str(target), save_as_external_data=True, location=data.name, size_threshold=1024)
    else:
        onnx.save(model, str(target))
