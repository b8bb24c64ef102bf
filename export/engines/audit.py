"""Which precision an engine really has, counted over its matrix products and convolutions.

The worst silent failure of engine building is a half-precision build that runs in float32. Two sources tell: the engine
inspector, which needs a GPU to open the engine, and the parsed network, whose types a strongly typed build must keep.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

#: What TensorRT calls a type, in words of their own: enum names, the inspector's short names and its descriptions.
_PRECISIONS = (
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"half|fp16|float16"),
    ("fp32", r"float|fp32|float32"),
    ("int8", r"int8"),
    ("fp8", r"fp8|float8"),
    ("int4", r"int4"),
    ("fp4", r"fp4"),
)
_PRODUCT_KINDS = re.compile(r"gemm|matmul|matrix|conv|correlation|fully|mha|attention|einsum", re.IGNORECASE)
_FUSED_PRODUCTS = re.compile(r"Fc|Mha|MatMul|Gemm|Conv")
_PRODUCT_TYPES = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM")
_TYPE_FIELDS = ("DataType", "Datatype", "Format/Datatype", "Format/DataType", "Format")


@dataclass(frozen=True)
class Audit:
    """Layers per precision, such as ``{"fp16": 84, "fp32": 2}``, and where that is known from."""

    layers: Mapping[str, int]
    source: str

    def line(self) -> str:
        """For people."""
        return f"{counted(self.layers)} ({self.source})" if self.layers else counted({})


def counted(layers: Mapping[str, int]) -> str:
    """``84 fp16 and 2 fp32 matrix products``."""
    if not layers:
        return "no matrix products"
    return " and ".join(f"{count} {name}" for name, count in layers.items()) + " matrix products"


def float32_problem(layers: Mapping[str, int] | None, precision: str) -> str | None:
    """What is wrong if more than half of the products of a ``precision`` engine run in float32; None if nothing is."""
    if precision == "fp32" or not layers:
        return None
    total, slow = sum(layers.values()), layers.get("fp32", 0)
    said = f"{slow} of {total} matrix products run in fp32 although the bundle says {precision}"
    return said if 2 * slow > total else None


def precision_of(text: str) -> str | None:
    """``fp16`` for ``Half``, ``DataType.HALF`` or ``Row major linear FP16 format``; None for what computes nothing."""
    words = text.lower()
    for name, pattern in _PRECISIONS:
        if re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", words):
            return name
    return None


def inspected_layers(text: str) -> dict[str, int] | None:
    """Products per precision from ``EngineInspector.get_engine_information(JSON)``.

    Reads TensorRT 10's ``Format/Datatype`` and TensorRT 11's separate ``DataType``. A layer's precision is its first
    input's, because a cast to the next layer's type is often fused into it. Where no layer tells its kind all count.

    Returns:
        None where the text tells nothing: not JSON, or layer names alone (an engine without DETAILED verbosity).
    """
    try:
        layers = [entry for entry in json.loads(text)["Layers"] if isinstance(entry, dict)]
    except (ValueError, KeyError, TypeError):
        return None
    if any(layer.get("LayerType") for layer in layers):
        layers = [layer for layer in layers if _is_product(layer)]
    found = Counter(precision for layer in layers if (precision := _layer_precision(layer)))
    return dict(found.most_common()) or None


def _is_product(layer: Mapping[str, Any]) -> bool:
    """By its type; fused layers are told by their names, which list what was fused, such as ``__myl_FcMulAdd_3``."""
    kind, name = str(layer.get("LayerType", "")), str(layer.get("Name", ""))
    if kind.lower() == "kgen":
        return bool(_FUSED_PRODUCTS.search(name))
    return bool(_PRODUCT_KINDS.search(name if kind.lower() in ("", "myelin", "foreignnode") else kind))


def _layer_precision(layer: Mapping[str, Any]) -> str | None:
    for side in ("Inputs", "Outputs"):
        for tensor in layer.get(side) or ():
            if not isinstance(tensor, dict):
                continue
            told = next((str(tensor[name]) for name in _TYPE_FIELDS if name in tensor), "")
            if precision := precision_of(told):
                return precision
    return None


def network_layers(trt: ModuleType, network: Any) -> dict[str, int]:
    """Products per precision in a parsed ``trt.INetworkDefinition``; empty for graphs without any.

    A product whose inputs all come out of dequantization counts as what was quantized: TensorRT fuses the three.
    """
    kinds = {getattr(trt.LayerType, name) for name in _PRODUCT_TYPES if hasattr(trt.LayerType, name)}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    found: Counter[str] = Counter()
    for layer in layers:
        if layer.type not in kinds:
            continue
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        quantized = [_quantized(trt, tensor, producers) for tensor in inputs if tensor is not None]
        stored = quantized[0] if quantized and None not in quantized else None
        name = stored or precision_of(str(layer.get_output(0).dtype))
        found[name or "other"] += 1
    return dict(found.most_common())


def _quantized(trt: ModuleType, tensor: Any, producers: Mapping[str, Any]) -> str | None:
    """The stored type of a tensor that was dequantized, seen through layers that only move it."""
    moving = (trt.LayerType.SHUFFLE, trt.LayerType.IDENTITY)
    layer = producers.get(tensor.name)
    while layer is not None and layer.type in moving:
        layer = producers.get(layer.get_input(0).name)
    if layer is None or layer.type != trt.LayerType.DEQUANTIZE:
        return None
    return precision_of(str(layer.get_input(0).dtype))
