"""What can be quantised in a graph: the matrix products with constant weights.

A layer goes by its weight's name without ``.weight``, so that the same name finds it in graphs of any precision.
Reads graphs without their external data; one weight at a time is loaded when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from ..runtime.errors import BundleError, UsageError

QUANTISED_KINDS = ("backbone", "modulation", "diffusion_step")
"""The graphs whose weights are large. The others are exact bookkeeping, or the VAE, whose errors would be seen."""

RAW_LATENT_LAYERS = ("z_proj", "head.input_proj")
"""Take raw latents, whose range is not bounded, and cost next to nothing: never quantised."""

DEFAULT_KEEP = ("head.final_layer.linear",)
"""Kept in high precision unless the caller says otherwise: its error is the error of eps itself, and it is 32 wide."""

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
_QUANTISED_OPS = ("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class Layer:
    """One matrix product with a constant weight.

    Attributes:
        name: the weight's name without ``.weight``.
        node: index of the node in the graph.
        activation: name of the tensor that enters.
        weight: name of the initializer.
        shape: (inputs, outputs).
        axis: axis of the weight that counts the outputs; 1 for MatMul.
    """

    name: str
    node: int
    activation: str
    weight: str
    shape: tuple[int, int]
    axis: int

    @property
    def multiplications(self) -> int:
        """Of one row."""
        return self.shape[0] * self.shape[1]

    @property
    def group(self) -> str:
        """The kind of layer, whatever its depth: ``encoder_blocks.*.mlp.fc1``."""
        parts = self.name.split(".")
        return ".".join("*" if part.isdigit() and index < 3 else part for index, part in enumerate(parts))


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph without external data.

    Raises:
        BundleError: the file is not an ONNX graph.
    """
    try:
        return onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None
    except Exception as error:  # protobuf's own exceptions share no base class across versions
        raise BundleError(f"{path} is not an ONNX graph: {str(error).splitlines()[0]}") from None


def quantisable(model: onnx.ModelProto) -> list[Layer]:
    """Layers in the order they run, without :data:`RAW_LATENT_LAYERS`.

    Raises:
        UsageError: the graph is quantised already.
    """
    if any(node.op_type in _QUANTISED_OPS for node in model.graph.node):
        raise UsageError("the graph is quantised already; start from an fp32 bundle")
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type in _FLOATS}
    layers: list[Layer] = []
    for index, node in enumerate(model.graph.node):
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights or node.input[0] in weights:
            continue
        weight = weights[node.input[1]]
        if len(weight.dims) != 2:
            continue
        options = {attribute.name: attribute for attribute in node.attribute}
        transposed = "transB" in options and options["transB"].i == 1
        rows, columns = weight.dims
        layer = Layer(
            name=weight.name.removesuffix(".weight"),
            node=index,
            activation=node.input[0],
            weight=weight.name,
            shape=(columns, rows) if transposed else (rows, columns),
            axis=0 if transposed else 1,
        )
        if layer.name not in RAW_LATENT_LAYERS:
            layers.append(layer)
    return layers


def weight_values(model: onnx.ModelProto, name: str, folder: Path) -> NDArray[np.float32]:
    """One initializer as float32; the graph's copy is not filled in. External data lies in ``folder``."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    if uses_external_data(tensor):
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        load_external_data_for_tensor(copy, str(folder))
        tensor = copy
    return numpy_helper.to_array(tensor).astype(np.float32)
