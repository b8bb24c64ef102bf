"""What lies inside a graph's file, looked at before any engine library sees it. Somebody else made the bundle.

A small strict reader of ONNX's protobuf messages, since the runtime has no ``onnx`` and engine libraries do what a
graph says: they open the files that it names, and load operators from elsewhere. Allowed is what the exporter writes:
one graph of plain ONNX operators, with no graph or function inside it (so that none can loop), with the inputs and
outputs of its kind, and weights either in the file or in the one data file that the manifest lists. Whatever this
reader does not know is refused. Does not know what the operators compute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError, printable
from ..files import sha256
from ..models.graphs import TensorSpec

MAX_MODEL_BYTES = 1 << 29
"""Larger weights lie in a data file: without them the largest graph has a few MB."""

_MAX_FIELDS = 1 << 20
"""What is read of one graph, so that tiny things by the million take neither memory nor time."""

_MAX_AXES = 32

_SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2, 17: 1, 19: 1}
"""TensorProto.DataType to bytes per element."""

_PRECISIONS = {1: "fp32", 10: "fp16", 16: "bf16", 3: "int8", 17: "fp8"}

_DTYPES = {1: "float32", 2: "uint8", 7: "int64"}
"""The types that inputs and outputs may have."""

# Messages as onnx.proto3 has them: field number to (name, kind). Kinds are int, float (4 bytes), double (8 bytes),
# bytes, or the name of a message; * marks repeated fields. A field that is not here is refused.
MESSAGES: dict[str, dict[int, tuple[str, str]]] = {
    "ModelProto": {
        1: ("ir_version", "int"),
        8: ("opset_import", "*OperatorSetIdProto"),
        2: ("producer_name", "bytes"),
        3: ("producer_version", "bytes"),
        4: ("domain", "bytes"),
        5: ("model_version", "int"),
        6: ("doc_string", "bytes"),
        7: ("graph", "GraphProto"),
        14: ("metadata_props", "*bytes"),
    },
    "OperatorSetIdProto": {1: ("domain", "bytes"), 2: ("version", "int")},
    "GraphProto": {
        1: ("node", "*NodeProto"),
        2: ("name", "bytes"),
        5: ("initializer", "*TensorProto"),
        10: ("doc_string", "bytes"),
        11: ("input", "*ValueInfoProto"),
        12: ("output", "*ValueInfoProto"),
        13: ("value_info", "*bytes"),
        16: ("metadata_props", "*bytes"),
    },
    "NodeProto": {
        1: ("input", "*bytes"),
        2: ("output", "*bytes"),
        3: ("name", "bytes"),
        4: ("op_type", "bytes"),
        7: ("domain", "bytes"),
        5: ("attribute", "*AttributeProto"),
        6: ("doc_string", "bytes"),
        9: ("metadata_props", "*bytes"),
    },
    "AttributeProto": {
        1: ("name", "bytes"),
        13: ("doc_string", "bytes"),
        20: ("type", "int"),
        2: ("f", "float"),
        3: ("i", "int"),
        4: ("s", "bytes"),
        5: ("t", "TensorProto"),
        7: ("floats", "*float"),
        8: ("ints", "*int"),
        9: ("strings", "*bytes"),
    },
    "TensorProto": {
        1: ("dims", "*int"),
        2: ("data_type", "int"),
        4: ("float_data", "*float"),
        5: ("int32_data", "*int"),
        7: ("int64_data", "*int"),
        8: ("name", "bytes"),
        9: ("raw_data", "bytes"),
        10: ("double_data", "*double"),
        11: ("uint64_data", "*int"),
        12: ("doc_string", "bytes"),
        13: ("external_data", "*StringStringEntryProto"),
        14: ("data_location", "int"),
        16: ("metadata_props", "*bytes"),
    },
    "StringStringEntryProto": {1: ("key", "bytes"), 2: ("value", "bytes")},
    "ValueInfoProto": {
        1: ("name", "bytes"),
        2: ("type", "TypeProto"),
        3: ("doc_string", "bytes"),
        4: ("metadata_props", "*bytes"),
    },
    "TypeProto": {1: ("tensor_type", "TypeProto.Tensor"), 6: ("denotation", "bytes")},
    "TypeProto.Tensor": {1: ("elem_type", "int"), 2: ("shape", "TensorShapeProto")},
    "TensorShapeProto": {1: ("dim", "*TensorShapeProto.Dimension")},
    "TensorShapeProto.Dimension": {1: ("dim_value", "int"), 2: ("dim_param", "bytes"), 3: ("denotation", "bytes")},
}
_VALUES = {"raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"}
_WIRE = {"int": 0, "double": 1, "float": 5}
_WIDTH = {1: 8, 5: 4}


class _GraphError(Exception):
    """What is wrong with a graph, in words."""


@dataclass(frozen=True)
class GraphFile:
    """A graph whose files were compared with the manifest, and whose model was looked through.

    Attributes:
        path: where it lies; its data file, if it has one, lies beside it.
        model: the very bytes that were looked through.
        stamps: each file with what :func:`stamp` said when it was compared, and its SHA-256 if that was compared, too.
        outputs: what it says that it gives; a library may find something else in it.
        precisions: what its weights are in, in the words of ``graphs.PRECISIONS``.
        linked: its data file, the second stamp's, is a link that leads out of the bundle (links.py).
    """

    path: Path
    model: bytes
    stamps: tuple[tuple[Path, tuple[int, ...], str | None], ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    precisions: frozenset[str] = frozenset()
    linked: bool = False

    def confirm(self) -> None:
        """To be called once a library has opened the files by their names: they are still those that were compared.

        Raises:
            BundleError: one was replaced or written to in between.
        """
        for path, before, digest in self.stamps:
            try:
                now = stamp(os.stat(path))
                same = now == before
                if not same and now[:-1] == before[:-1]:  # only the last change: somebody may have linked to it
                    same = digest is None or sha256(path) == digest
            except OSError:
                same = False
            if not same:
                raise BundleError(f"{path} was changed while the bundle was being opened; try again")


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_graph(
    model: bytes,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    opset: int,
    data: str | None = None,
    data_bytes: int = 0,
) -> frozenset[str]:
    """Looks a graph through; what its weights are in.

    Args:
        model: its file's content.
        inputs, outputs: what it must have, in this order.
        opset: version of ONNX's operators that the manifest gives.
        data: name of the data file that lies beside it, if there is one.
        data_bytes: size of the data file.

    Raises:
        BundleError: what is wrong, in words that stand behind the file's name.
    """
    try:
        reader = _Reader()
        reader.check(model, {"input": inputs, "output": outputs}, opset, data, data_bytes)
    except _GraphError as error:
        raise BundleError(str(error)) from None
    return frozenset(reader.precisions)


class _Reader:
    """Reads one graph."""

    def __init__(self) -> None:
        self._left = _MAX_FIELDS
        self.precisions: set[str] = set()

    def check(
        self,
        model: bytes,
        contract: dict[str, tuple[TensorSpec, ...]],
        opset: int,
        data: str | None,
        data_bytes: int,
    ) -> None:
        root = self._fields(memoryview(model), "ModelProto")
        self._check_opsets(root.get("opset_import", []), opset)
        if "graph" not in root:
            raise _GraphError("there is no graph in it")
        graph = self._fields(root["graph"], "GraphProto")
        for side, expected in contract.items():
            values = graph.get(side, [])
            if len(values) != len(expected):
                raise _GraphError(f"it has {len(values)} {side}s, the manifest says {len(expected)}")
            for found, wanted in zip(map(self._tensor_spec, values), expected, strict=True):
                if found != wanted:
                    raise _GraphError(f"its {side} is {_described(found)}, the manifest says {_described(wanted)}")
        for tensor in graph.get("initializer", []):
            kind, axes = self._check_tensor(tensor, data, data_bytes)
            if axes > 1 and kind in _PRECISIONS:
                self.precisions.add(_PRECISIONS[kind])
        for node in graph.get("node", []):
            self._check_node(node)

    def _check_opsets(self, imports: list[memoryview], opset: int) -> None:
        for entry in imports:
            fields = self._fields(entry, "OperatorSetIdProto")
            if _text(fields.get("domain", b"")) not in ("", "ai.onnx"):
                raise _GraphError(
                    f"it wants operators of {_quoted(_text(fields['domain']))}; only ONNX's own are allowed"
                )
            if fields.get("version", 0) != opset:
                raise _GraphError(f"its opset is {fields.get('version', 0)}, the manifest says {opset}")
        if not imports:
            raise _GraphError("it names no opset")

    def _check_node(self, node: memoryview) -> None:
        fields = self._fields(node, "NodeProto")
        domain, kind = _text(fields.get("domain", b"")), _text(fields.get("op_type", b""))
        if domain not in ("", "ai.onnx"):
            raise _GraphError(f"it has the operator {_quoted(kind)} of {_quoted(domain)}; only ONNX's own are allowed")
        for attribute in fields.get("attribute", []):
            value = self._fields(attribute, "AttributeProto").get("t")
            if value is not None:
                self._check_tensor(value, None, 0)

    def _check_tensor(self, tensor: memoryview, data: str | None, data_bytes: int) -> tuple[int, int]:
        """Its values are in the file, or at a place of the data file that exists; their size is what the shape says.

        Returns:
            Its data type and its number of axes.
        """
        fields = self._fields(tensor, "TensorProto")
        name = _quoted(_text(fields.get("name", b"")))
        dims, kind = fields.get("dims", []), fields.get("data_type", 0)
        if kind not in _SIZES:
            raise _GraphError(f"the weight {name} has the data type {kind}, which no bundle needs")
        if len(dims) > _MAX_AXES:
            raise _GraphError(f"the weight {name} has {len(dims)} axes")
        size = _SIZES[kind]
        for dim in dims:
            if dim >= 1 << 40:  # negative ones are larger than that
                raise _GraphError(f"the weight {name} has an axis of {dim}")
            size *= dim
        external = [self._fields(entry, "StringStringEntryProto") for entry in fields.get("external_data", [])]
        if not external and not fields.get("data_location", 0):
            if "raw_data" in fields and len(fields["raw_data"]) != size:
                raise _GraphError(f"the weight {name} has {len(fields['raw_data'])} bytes, its shape says {size}")
            if size // _SIZES[kind] > len(tensor):
                raise _GraphError(f"the weight {name} has fewer values than its shape says")
            return kind, len(dims)
        pairs = [(_text(entry.get("key", b"")), _text(entry.get("value", b""))) for entry in external]
        place = dict(pairs)
        location = place.get("location", "")
        if data is None or location != data:
            allowed = f"only {data!r}, which the manifest lists, is allowed" if data else "the manifest lists none"
            raise _GraphError(f"the weight {name} lies in another file, {_quoted(location)}; {allowed}")
        numbers = [place.get("offset", "0"), place.get("length", str(size))]
        if len(place) != len(pairs) or set(place) - {"location", "offset", "length"} or fields.keys() & _VALUES:
            raise _GraphError(f"the place of the weight {name} in {data!r} is not clear")
        if not all(text.isascii() and text.isdigit() and len(text) < 19 for text in numbers):
            raise _GraphError(f"the place of the weight {name} in {data!r} is no number")
        offset, length = map(int, numbers)
        if length != size or offset + length > data_bytes:
            raise _GraphError(
                f"the weight {name} is at {offset} with {length} bytes; "
                f"its shape says {size}, {data!r} has {data_bytes}"
            )
        return kind, len(dims)

    def _tensor_spec(self, value: memoryview) -> TensorSpec:
        fields = self._fields(value, "ValueInfoProto")
        name = _text(fields.get("name", b""))
        tensor = self._fields(
            self._fields(fields.get("type", memoryview(b"")), "TypeProto").get("tensor_type", memoryview(b"")),
            "TypeProto.Tensor",
        )
        kind = tensor.get("elem_type", 0)
        if "shape" not in tensor:
            raise _GraphError(f"{_quoted(name)} has no shape")
        axes: list[int | str] = []
        for entry in self._fields(tensor["shape"], "TensorShapeProto").get("dim", []):
            dimension = self._fields(entry, "TensorShapeProto.Dimension")
            if {"dim_value", "dim_param"} <= dimension.keys():  # libraries take the last one
                raise _GraphError(f"an axis of {_quoted(name)} is both a number and a letter")
            axes.append(dimension["dim_value"] if "dim_value" in dimension else _text(dimension.get("dim_param", b"")))
        return TensorSpec(name, _DTYPES.get(kind, f"type {kind}"), tuple(axes))

    def _fields(self, message: memoryview | bytes, kind: str) -> dict[str, Any]:
        """The fields of one message by name: numbers, or views of the bytes; lists where the field is repeated.

        Raises:
            _GraphError: it is damaged, has a field that is not in :data:`MESSAGES`, or a single one twice (libraries
                differ in which of the two they take).
        """
        known = MESSAGES[kind]
        found: dict[str, Any] = {}
        for number, wire, value in _wire_fields(memoryview(message)):
            if number not in known:
                raise _GraphError(f"{kind} has the field {number}, which no bundle needs")
            name, form = known[number]
            repeated, form = form[0] == "*", form.lstrip("*")
            expected = _WIRE.get(form, 2)
            packed = repeated and wire == 2 and expected != 2
            if wire != expected and not packed:
                raise _GraphError(f"{kind}.{name} is damaged")
            self._left -= len(value) if packed and name in ("dims", "ints") else 1
            if self._left < 0:
                raise _GraphError("it has more parts than any graph of this project")
            if not repeated:
                if name in found:
                    raise _GraphError(f"{kind}.{name} stands twice")
                found[name] = value
            elif name == "dims" and packed:
                found.setdefault(name, []).extend(_varints(value))
            else:
                found.setdefault(name, []).append(value)
        return found


def _wire_fields(message: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, value) as they stand."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
        else:
            if wire == 2:
                size, at = _varint(message, at)
            elif wire in _WIDTH:
                size = _WIDTH[wire]
            else:
                raise _GraphError("it is not an ONNX graph, or damaged")
            if size > end - at:
                raise _GraphError("it is not an ONNX graph, or cut short")
            value, at = message[at : at + size], at + size
        yield number, wire, value


def _varints(packed: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        values.append(value)
    return values


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise _GraphError("it is not an ONNX graph, or cut short")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _text(value: memoryview | bytes) -> str:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        raise _GraphError("a name in it is not text") from None


def _described(tensor: TensorSpec) -> str:
    return _quoted(f"{tensor.dtype} {tensor.name}[{','.join(map(str, tensor.axes))}]")


def _quoted(text: str) -> str:
    return repr(printable(text, 60))
