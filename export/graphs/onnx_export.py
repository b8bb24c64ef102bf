"""Writes one graph as ONNX with PyTorch's current exporter, and checks that it keeps its contract.

Path-based checks only (a graph may exceed protobuf's 2 GB): external data lies in one file beside the model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import torch
from torch import nn

from ...runtime.bundle.graph_file import check_graph
from ...runtime.bundle.manifest import data_file
from ...runtime.errors import BundleError, GtrError
from ...runtime.models.graphs import OPSETS, GraphSpec, TensorSpec
from .diffusion_head import Modulation, TimestepEmbedder
from .layers import transpose_for_export

#: Example sizes to trace with: all different and at least 2, so that no axis is specialised or taken for another.
TRACE_SIZES = {"G": 2, "B": 3, "V": 7, "P": 5, "R": 11, "N": 13, "K": 4, "S": 6, "M": 9, "Q": 8, "T": 10}

EXTERNAL_DATA_BYTES = 64 * 2**20
"""Weights above this size go into one ``.data`` file beside the graph."""


def example_inputs(spec: GraphSpec) -> tuple[torch.Tensor, ...]:
    """Valid arguments for tracing; index inputs are 0, which is in range for every table."""
    return tuple(
        torch.zeros(t.shape(TRACE_SIZES), dtype=torch.int64)
        if t.dtype == "int64"
        else torch.randn(t.shape(TRACE_SIZES))
        for t in spec.inputs
    )


def export_graph(module: nn.Module, spec: GraphSpec, precision: str, path: Path) -> None:
    """Writes ``path`` (and ``path``.data when the weights are large).

    The module is rewritten in place (weights joined and transposed, timesteps tabulated): use it for nothing else.

    Raises:
        GtrError: the exporter failed, or the graph's inputs, outputs or axes are not those of the contract.
    """
    for part in list(module.modules()):
        if isinstance(part, TimestepEmbedder):
            part.tabulate_for_export()
        elif isinstance(part, Modulation):
            part.fuse_for_export()
    transpose_for_export(module)
    axes = {name: torch.export.Dim.DYNAMIC for name in spec.symbols}
    dynamic = tuple({i: axes[a] for i, a in enumerate(t.axes) if isinstance(a, str)} for t in spec.inputs)
    weight_bytes = sum(p.numel() * p.element_size() for p in (*module.parameters(), *module.buffers()))
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                example_inputs(spec),
                dynamo=True,
                opset_version=OPSETS[precision],
                input_names=[t.name for t in spec.inputs],
                output_names=[t.name for t in spec.outputs],
                dynamic_shapes=dynamic,
                optimize=True,
                verbose=False,
            )
            if program is None:
                raise GtrError(f"PyTorch's exporter returned nothing for the {spec.kind} graph")
            _name_axes(program.model.graph.inputs, spec.inputs)
            _name_axes(program.model.graph.outputs, spec.outputs)
            for node in program.model.graph:  # where its source lies on this machine
                node.metadata_props.clear()
            program.save(str(path), external_data=weight_bytes > EXTERNAL_DATA_BYTES)
    except torch.onnx.OnnxExporterError as error:
        raise GtrError(f"PyTorch could not export the {spec.kind} graph: {str(error).splitlines()[0]}") from error
    check_written(path, spec, precision)


def check_written(path: Path, spec: GraphSpec, precision: str) -> None:
    """Checks a written graph against ONNX's rules, and as every reader of a bundle will.

    Raises:
        GtrError: invalid ONNX, or anything that :func:`~...runtime.bundle.graph_file.check_graph` refuses.
    """
    onnx.checker.check_model(str(path))
    data = data_file(path)
    name, size = (data.name, data.stat().st_size) if data.is_file() else (None, 0)
    try:
        check_graph(path.read_bytes(), spec.inputs, spec.outputs, OPSETS[precision], name, size)
    except BundleError as error:
        raise GtrError(f"{path.name}: {error}") from None


def _name_axes(values: Sequence, specs: Sequence[TensorSpec]) -> None:
    """Gives symbolic axes the contract's letters. An axis that came out as a number stays one, and fails the check."""
    import onnx_ir

    for value, spec in zip(values, specs, strict=True):
        dims = [
            onnx_ir.SymbolicDim(wanted) if isinstance(wanted, str) and not isinstance(found, int) else found
            for found, wanted in zip(value.shape, spec.axes, strict=True)
        ]
        value.shape = onnx_ir.Shape(dims)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and warns about its own internals; failures still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
