"""Evaluates bfloat16 graphs where no bfloat16 kernels are: every bfloat16 operation in float32, rounded afterwards.

ONNX Runtime's CPU provider has no bfloat16 matrix product. A widened copy computes each such node in float32 on inputs
that hold bfloat16 values and rounds its output to bfloat16, which is what hardware with float32 accumulation does. For
verification only; deployment runs the graphs as they are.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import onnx_ir.passes.common

#: Operators that move or convert values and have bfloat16 kernels (or need none).
_AS_THEY_ARE = {"Cast", "Constant", "Identity"}


def widen(source: Path, target: Path) -> Path:
    """Writes the widened copy of ``source`` and returns ``target``."""
    model = onnx_ir.load(source)
    onnx_ir.passes.common.ShapeInferencePass()(model)
    graph = model.graph
    for node in list(graph):
        if node.op_type in _AS_THEY_ARE:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == onnx_ir.DataType.BFLOAT16:
                cast = _cast(value, onnx_ir.DataType.FLOAT)
                graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for output in node.outputs:
            if output.dtype == onnx_ir.DataType.BFLOAT16:
                uses = list(output.uses())
                output.dtype = onnx_ir.DataType.FLOAT
                cast = _cast(output, onnx_ir.DataType.BFLOAT16)
                graph.insert_after(node, cast)
                for user, position in uses:
                    user.replace_input_with(position, cast.outputs[0])
    external = f"{target.name}.data" if source.with_name(source.name + ".data").exists() else None
    onnx_ir.save(model, target, external_data=external)
    return target


def _cast(value: onnx_ir.Value, dtype: onnx_ir.DataType) -> onnx_ir.Node:
    node = onnx_ir.node("Cast", [value], attributes={"to": dtype.value})
    node.outputs[0].dtype = dtype
    node.outputs[0].shape = value.shape
    return node
