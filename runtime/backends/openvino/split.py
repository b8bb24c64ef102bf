"""Cuts a bfloat16 graph for OpenVINO, so that its bfloat16 hint lowers the network and nothing around it.

The hint is for a whole compiled model, float32 tensors included. What the exporter keeps in float32 around the network
(timesteps up to 999, of which bfloat16 keeps every fourth; the projection of raw latents; the arithmetic of the reverse
step) therefore has to be compiled on its own. Where to cut is read from the types in the graph:

    before   what no bfloat16 operation comes before, as far as the network needs it: float32
    network  from the first bfloat16 operation to the last, the residual stream between them included: the hint applies
    after    what no bfloat16 operation comes after: float32
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import BackendError

#: Operations that compute sums of products, where lowering makes a difference that counts.
_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution", "Einsum")
_SHAPE = "ShapeOf"


@dataclass(frozen=True)
class Part:
    """A piece of a graph, or all of it: an ``openvino.Model``, whether it is the network in bfloat16, and its tensors'
    names in the model's order; inputs are of the graph, or of an earlier part's outputs."""

    model: Any
    lowered: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def whole(model: Any) -> Part:
    """The graph as one part."""
    return Part(model, False, tuple(map(_name, model.inputs)), tuple(map(_name, model.outputs)))


def has_bfloat16(openvino: Any, model: Any) -> bool:
    """Whether some operation on the way from the inputs to the outputs reads or writes bfloat16."""
    return bool(_Flow(openvino, model).low)


def split(openvino: Any, model: Any, kind: str) -> tuple[Part, ...]:
    """The parts in the order they run, one to three; the whole graph where nothing in it is bfloat16.

    Raises:
        BackendError: a float32 product, or a float32 input of the graph, comes in between bfloat16 operations, so that
            no cut keeps it in float32.
    """
    flow = _Flow(openvino, model)
    if not flow.low:
        return (whole(model),)
    network = flow.after & flow.before
    _check(flow, network, kind)
    into = flow.crossings(flow.live - flow.after, network)
    out = flow.crossings(network, flow.live - network)
    last = _part(openvino, model, out, None, False)
    middle = _part(openvino, model, into, [name for name in last.inputs if name in out], True)
    needed = [name for name in middle.inputs if name in into]
    first = (_part(openvino, model, (), needed, False),) if needed else ()
    for part in (*first, last):
        if has_bfloat16(openvino, part.model):
            raise _refusal(kind, "some of its bfloat16 operations are outside of the network")
    return (*first, middle, last)


class _Flow:
    """Which nodes depend on the inputs (``live``), are in bfloat16 (``low``), and come ``after`` or ``before`` such.

    All are sets of OpenVINO's own unique node names; ``after`` and ``before`` include ``low``.
    """

    def __init__(self, openvino: Any, model: Any) -> None:
        self.nodes = {node.get_name(): node for node in model.get_ordered_ops()}
        bfloat16 = openvino.Type.bf16
        self.live: set[str] = set()
        self.low: set[str] = set()
        self.after: set[str] = set()
        self.before: set[str] = set()
        for name, node in self.nodes.items():
            sources = {source.get_name() for source in _sources(node)}
            if node.get_type_name() != "Parameter" and not sources & self.live:
                continue
            self.live.add(name)
            types = {port.get_element_type() for port in (*node.inputs(), *node.outputs())}
            if bfloat16 in types and node.get_type_name() != _SHAPE:
                self.low.add(name)
            if name in self.low or sources & self.after:
                self.after.add(name)
        for name, node in reversed(self.nodes.items()):
            if name in self.low or {reader.get_name() for reader in _readers(node)} & self.before:
                self.before.add(name)

    def crossings(self, here: Collection[str], there: Collection[str]) -> list[str]:
        """Computed floating-point values of ``here`` that ``there`` reads, as the friendly node name, ``:`` and port.

        A value whose shape alone is read counts too: the other part would compute it anew for that.
        """
        found: list[str] = []
        for name, node in self.nodes.items():
            if name not in here or node.get_type_name() == "Parameter":
                continue
            for index, output in enumerate(node.outputs()):
                readers = [port.get_node() for port in output.get_target_inputs()]
                read = any(reader.get_name() in there or reader.get_type_name() == _SHAPE for reader in readers)
                if read and output.get_element_type().is_real():
                    found.append(f"{node.get_friendly_name()}:{index}")
        return found


def _check(flow: _Flow, network: Collection[str], kind: str) -> None:
    """Whether the hint can lower the network without lowering what the exporter kept in float32."""
    for name in network:
        node = flow.nodes[name]
        if name in flow.low:
            continue
        if node.get_type_name() in _PRODUCTS:
            raise _refusal(kind, f"its float32 product {node.get_friendly_name()} is between bfloat16 operations")
        for source in node.input_values():
            if source.get_node().get_type_name() == "Parameter" and source.get_element_type().is_real():
                what = f"its float32 input {_name(source)} is read between bfloat16 operations"
                raise _refusal(kind, f"{what}, by {node.get_friendly_name()}")
    names = [flow.nodes[name].get_friendly_name() for name in flow.live]
    if len(set(names)) != len(names):
        raise _refusal(kind, "two of its nodes have the same name")


def _refusal(kind: str, why: str) -> BackendError:
    return BackendError(
        f"the {kind} graph cannot be cut for OpenVINO's bfloat16: {why}; rebuild the bundle with gtr-export build, or "
        "use an fp32 bundle"
    )


def _part(openvino: Any, model: Any, begins: Iterable[str], ends: Iterable[str] | None, lowered: bool) -> Part:
    """A copy of what computes ``ends`` (the graph's own outputs if None) from ``begins`` and the graph's inputs."""
    copy = model.clone()
    nodes = {node.get_friendly_name(): node for node in copy.get_ordered_ops()}

    def value(name: str) -> Any:
        friendly, index = name.rsplit(":", 1)
        return nodes[friendly].output(int(index))

    if ends is None:
        results, names = list(copy.get_results()), [_name(output) for output in copy.outputs]
    else:
        names = list(ends)
        results = [openvino.opset8.result(value(name)) for name in names]
    for name in begins:
        output = value(name)
        begin = openvino.opset8.parameter(output.get_partial_shape(), output.get_element_type(), name)
        begin.output(0).set_names({name})
        for port in output.get_target_inputs():
            port.replace_source_output(begin.output(0))
    parameters = list(_parameters(results))
    part = openvino.Model(results, parameters, f"{model.get_friendly_name()} part")
    return Part(part, lowered, tuple(_name(parameter.output(0)) for parameter in parameters), tuple(names))


def _parameters(results: Iterable[Any]) -> Iterator[Any]:
    """The parameters that ``results`` depend on, each once."""
    seen: set[str] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node.get_name() in seen:
            continue
        seen.add(node.get_name())
        if node.get_type_name() == "Parameter":
            yield node
        waiting += _sources(node)


def _sources(node: Any) -> list[Any]:
    return [value.get_node() for value in node.input_values()]


def _readers(node: Any) -> list[Any]:
    return [port.get_node() for output in node.outputs() for port in output.get_target_inputs()]


def _name(port: Any) -> str:
    """A tensor name of the ONNX file, or the one a cut has given."""
    return str(port.get_any_name())
