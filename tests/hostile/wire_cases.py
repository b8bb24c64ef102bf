"""More hostile graphs that looking finds out: what no bundle needs, wrong contracts, tricks with protobuf."""

from __future__ import annotations

import random

import numpy as np
import onnx
from graph_cases import (
    FLOAT,
    IMAGE,
    INT64,
    LATENTS,
    PICTURE,
    UINT8,
    Copy,
    case,
    constant,
    external,
    model,
    model_case,
    showing,
    sound,
    tensor,
)
from onnx import TensorProto, helper


def _cast(**more: object) -> onnx.ModelProto:
    return model([helper.make_node("Cast", ["latents"], ["image"], to=UINT8)], **more)  # type: ignore[arg-type]


def _of_domain(kind: str, domain: str, **attributes: object) -> onnx.ModelProto:
    node = helper.make_node(kind, ["latents"], ["image"], domain=domain, **attributes)
    return model([node], opsets=(("", 20), (domain, 1)))


# Operators of others.
model_case("operator-of-a-stranger", lambda: _of_domain("Evil", "evil.com"))
model_case("operator-of-microsoft", lambda: _of_domain("Gelu", "com.microsoft"))
model_case(
    "engine-context",
    lambda: _of_domain("EPContext", "com.microsoft", embed_mode=0, ep_cache_context="evil.so", source="evil"),
)
model_case("python-operator", lambda: _of_domain("PythonOp", "com.microsoft", func_name="os.system"))
model_case("operator-of-ai-onnx-ml", lambda: _of_domain("Scaler", "ai.onnx.ml"))
model_case("operator-of-a-domain-not-imported", lambda: _domain_not_imported())
model_case("operator-with-a-long-name", lambda: _of_domain("E" * 100_000, "x" * 100_000))
model_case("operator-that-moves-the-cursor", lambda: _of_domain("\x1b[2J\x1b[31mEvil\r\n", "evil\x1b]0;x\x07"))
model_case("operator-that-is-unknown", lambda: model([helper.make_node("Frobnicate", ["latents"], ["image"])]))
model_case("operator-with-missing-input", lambda: model([helper.make_node("Cast", ["none"], ["image"], to=UINT8)]))


def _domain_not_imported() -> onnx.ModelProto:
    changed = _of_domain("Evil", "evil.com")
    del changed.opset_import[1]
    return changed


def _opsets(*opsets: tuple[str, int]) -> onnx.ModelProto:
    return _cast(opsets=opsets)


model_case("opset-9999", lambda: _opsets(("", 9999)))
model_case("opset-negative", lambda: _opsets(("", -1)))
model_case("opset-twice", lambda: _opsets(("", 20), ("", 9)))
model_case("opset-under-two-names", lambda: _opsets(("", 20), ("ai.onnx", 21)))
model_case("opset-missing", lambda: _opsets())


@case
def functions(copy: Copy) -> None:
    changed = sound()
    identity = helper.make_node("Identity", ["x"], ["y"])
    changed.functions.append(
        helper.make_function("", "Expand", ["x"], ["y"], [identity], [helper.make_opsetid("", 20)])
    )
    copy.put(changed)


@case
def training(copy: Copy) -> None:
    changed = sound()
    changed.training_info.add().algorithm.CopyFrom(showing(external(str(copy.secret))).graph)
    copy.put(changed)


@case
def sparse_weights(copy: Copy) -> None:
    changed = sound()
    values = tensor((1,), FLOAT, name="s", raw_data=bytes(4))
    changed.graph.sparse_initializer.append(helper.make_sparse_tensor(values, constant("i", [0]), [5]))
    copy.put(changed)


@case
def sparse_attribute(copy: Copy) -> None:
    changed = sound()
    values = tensor((1,), FLOAT, name="s", raw_data=bytes(4))
    sparse = helper.make_sparse_tensor(values, constant("i", [0]), [5])
    changed.graph.node.append(helper.make_node("Constant", [], ["more"], sparse_value=sparse))
    copy.put(changed)


@case
def quantization_annotation(copy: Copy) -> None:
    changed = sound()
    changed.graph.quantization_annotation.add(tensor_name="w")
    copy.put(changed)


def _value(name: str, kind: int, dims: list[int | str] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def _subgraph(kind: str) -> onnx.ModelProto:
    same = helper.make_node("Identity", ["v"], ["vo"])
    if kind == "Loop":
        inputs = [_value("i", INT64, []), _value("c", TensorProto.BOOL, []), _value("v", FLOAT)]
        nodes = [helper.make_node("Identity", ["c"], ["co"]), helper.make_node("Sin", ["v"], ["vo"])]
        outputs = [_value("co", TensorProto.BOOL, []), _value("vo", FLOAT)]
        body = helper.make_graph(nodes, "body", inputs, outputs)
        node = helper.make_node("Loop", ["trips", "yes", "latents"], ["l"], body=body)
    elif kind == "If":
        branch = helper.make_graph([helper.make_node("Identity", ["latents"], ["vo"])], "b", [], [_value("vo", FLOAT)])
        node = helper.make_node("If", ["yes"], ["l"], then_branch=branch, else_branch=branch)
    else:
        body = helper.make_graph([same], "body", [_value("v", FLOAT)], [_value("vo", FLOAT)])
        node = helper.make_node("Scan", ["latents"], ["l"], body=body, num_scan_inputs=1)
    cast = helper.make_node("Cast", ["l"], ["image"], to=UINT8)
    return model([node, cast], [constant("trips", 2**62), constant("yes", True, np.bool_)])


for _kind in ("Loop", "If", "Scan"):
    model_case(f"subgraph-{_kind.lower()}", lambda kind=_kind: _subgraph(kind))


# Another contract than the manifest's.
def _contract(*outputs: onnx.ValueInfoProto, inputs: tuple[onnx.ValueInfoProto, ...] = (LATENTS,)) -> onnx.ModelProto:
    return _cast(inputs=inputs, outputs=outputs or (IMAGE,))


_DIMS: list[int | str] = ["B", *PICTURE[1:]]
_OTHER_DIMS: dict[str, list[int | str] | None] = {
    "small": ["B", 8, 8, 3],
    "wide": ["B", 20_000, 20_000, 3],
    "grey": ["B", 32, 32, 1],
    "rank-2": ["B", 3072],
    "scalar": [],
    "shapeless": None,
    "negative": ["B", 32, 32, -3],
    "huge": ["B", 32, 32, 2**62],
    "letter": ["B", "H", "W", 3],
    "other-letter": ["N", 32, 32, 3],
    "batch-of-5": [5, 32, 32, 3],
}
for _name, _dims in _OTHER_DIMS.items():
    model_case(f"image-{_name}", lambda dims=_dims: _contract(_value("image", UINT8, dims)))
for _name, _kind in {
    "float": FLOAT, "double": TensorProto.DOUBLE, "string": TensorProto.STRING, "half": TensorProto.FLOAT16,
    "complex": TensorProto.COMPLEX128, "unknown": 99, "undefined": 0,
}.items():  # fmt: skip
    model_case(f"image-of-{_name}", lambda kind=_kind: _contract(_value("image", kind, _DIMS)))
model_case("image-renamed", lambda: _contract(_value("picture", UINT8, _DIMS)))
model_case("image-renamed-to-control-codes", lambda: _contract(_value("\x1b[2J\n\rimage\u202e", UINT8, _DIMS)))
model_case("image-renamed-at-length", lambda: _contract(_value("x" * 1_000_000, UINT8, _DIMS)))
model_case("image-twice", lambda: _contract(IMAGE, _value("more", UINT8, _DIMS)))
model_case("image-missing", lambda: model([], outputs=()))
model_case("image-of-float-by-its-name", lambda: _contract(_value("uint8 image", FLOAT, _DIMS)))
model_case("input-missing", lambda: model([], inputs=()))
model_case("input-renamed", lambda: _contract(inputs=(_value("x", FLOAT, ["B", 64, 16]),)))
model_case("input-too-many", lambda: _contract(inputs=(LATENTS, _value("x", FLOAT, [1]))))
model_case("input-ten-thousand", lambda: _contract(inputs=(LATENTS,) * 10_000))
model_case("input-double", lambda: _contract(inputs=(_value("latents", TensorProto.DOUBLE, ["B", 64, 16]),)))
model_case("sequence", lambda: _contract(helper.make_tensor_sequence_value_info("image", FLOAT, None)))


def _typed(kind: str) -> onnx.ModelProto:
    changed = _contract(onnx.ValueInfoProto(name="image"))
    proto = changed.graph.output[0].type
    if kind == "optional":
        proto.optional_type.elem_type.tensor_type.elem_type = UINT8
    elif kind == "map":
        proto.map_type.key_type = INT64
    elif kind == "sparse":
        proto.sparse_tensor_type.elem_type = UINT8
    return changed


for _kind in ("optional", "map", "sparse", "nothing"):
    model_case(f"type-{_kind}", lambda kind=_kind: _typed(kind))

for _kind in ("backbone", "modulation", "diffusion_step", "detail_score", "select_rows", "merge_rows"):
    model_case(f"decoder-in-place-of-{_kind.replace('_', '-')}", sound, _kind)


# Weights whose sizes lie.
for _name, _weight in {
    "too-few-bytes": tensor(raw_data=bytes(10)),
    "too-many-bytes": tensor(raw_data=bytes(9999)),
    "no-values": tensor(),
    "too-few-values": tensor(int32_data=[1]),
    "negative-axis": tensor((-5, 3), raw_data=bytes(15)),
    "huge-axis": tensor((2**62,), raw_data=bytes(16)),
    "sizes-that-wrap": tensor((2**32, 2**32), raw_data=b""),
    "terabyte": tensor((10**6, 10**6), FLOAT),
    "unknown-type": tensor(kind=99, raw_data=bytes(3072)),
    "type-of-nothing": tensor(kind=0, raw_data=bytes(3072)),
    "strings": tensor((1,), TensorProto.STRING, string_data=[b"a"]),
    "complex": tensor((1,), TensorProto.COMPLEX64, raw_data=bytes(8)),
    "half-bytes": tensor((2,), TensorProto.INT4, raw_data=bytes(1)),
    "segment": tensor(raw_data=bytes(3072), segment=TensorProto.Segment(begin=0, end=2**62)),
}.items():
    model_case(f"weight-{_name}", lambda weight=_weight: showing(weight))


# Bytes that no library of protobuf would write.
def varint(value: int, padded: int = 0) -> bytes:
    """``padded``: as many bytes at least, the last ones saying nothing."""
    parts = []
    while value > 127 or len(parts) + 1 < padded:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def wire(number: int, kind: int, payload: bytes = b"") -> bytes:
    """One field, with its length where it has one."""
    return varint(number << 3 | kind) + (varint(len(payload)) if kind == 2 else b"") + payload


def appended(in_model: bytes = b"", in_graph: bytes = b"") -> bytes:
    """The sound decoder with more fields at the end of the model or of its graph."""
    changed = sound()
    graph = changed.graph.SerializeToString()
    changed.ClearField("graph")
    return changed.SerializeToString() + wire(7, 2, graph + in_graph) + in_model


_NAMED = wire(8, 2, b"more")
_HEAD = wire(2, 0, varint(UINT8)) + _NAMED
_AXES = {"many": varint(2**39) * 200_000, "cut": b"\x01\x80", "endless": b"\xff" * 50}
for _name, _content in {
    "empty": b"",
    "text": b"not an ONNX graph\n",
    "garbage": random.Random(0).randbytes(5000),
    "ones": b"\xff" * 5000,
    "cut": sound().SerializeToString()[:-10],
    "long": sound().SerializeToString() + b"\0" * 10,
    "no-graph": sound().SerializeToString()[:2],
    "twice": sound().SerializeToString() * 2,
    "second-graph": appended(wire(7, 2, _cast().graph.SerializeToString())),
    "second-version": appended(wire(1, 0, varint(3))),
    "second-type": appended(in_graph=wire(5, 2, _HEAD + wire(2, 0, varint(FLOAT)))),
    "second-raw-data": appended(in_graph=wire(5, 2, _HEAD + 2 * wire(9, 2, b"x"))),
    "group": appended(wire(7, 3) + wire(7, 4)),
    "end-of-a-group": appended(wire(7, 4)),
    "wire-type-6": appended(wire(1, 6)),
    "version-as-text": appended().replace(b"\x08\x0a", b"\x0a\x00", 1),
    "graph-as-number": appended(wire(7, 0, b"\x01")),
    "unknown-field": appended(wire(99, 0, b"\x01")),
    "unknown-field-in-the-graph": appended(in_graph=wire(77, 2, b"x")),
    "field-0": appended(wire(0, 0, b"\x01")),
    "field-of-2-to-the-40": appended(wire(2**40, 0, b"\x01")),
    "number-of-11-bytes": appended(wire(5, 0, varint(1, padded=11))),
    "length-beyond": appended(b"\x32\xff\xff\xff\xff\x0f"),
    "length-of-2-to-the-63": appended(b"\x32" + varint(2**63)),
    "type-beyond-32-bits": appended(in_graph=wire(5, 2, wire(2, 0, varint(2**32 + UINT8)) + _NAMED)),
    "location-beyond-32-bits": appended(in_graph=wire(5, 2, _HEAD + wire(14, 0, varint(2**32 + 1)))),
    "name-that-is-no-text": appended(in_graph=wire(5, 2, wire(2, 0, varint(UINT8)) + wire(8, 2, b"\xff\xfe"))),
    **{f"axes-{name}": appended(in_graph=wire(5, 2, _HEAD + wire(1, 2, axes))) for name, axes in _AXES.items()},
    "types-in-types": appended(in_graph=wire(12, 2, wire(2, 2, b"\x22\x80\x80\x04" * 100_000))),
}.items():
    model_case(f"bytes-{_name}", lambda content=_content: content)
model_case("bytes-millions-of-operators", lambda: appended(in_graph=wire(1, 2) * 20_000_000))
model_case("bytes-millions-of-inputs", lambda: appended(in_graph=wire(1, 2, wire(1, 2) * 20_000_000)))
model_case("bytes-millions-of-axes", lambda: appended(in_graph=wire(5, 2, _HEAD + wire(1, 2, b"\1" * 50_000_000))))
model_case(
    "bytes-millions-of-numbers", lambda: appended(in_graph=wire(1, 2, wire(5, 2, wire(8, 2, b"\1" * 50_000_000))))
)


@case
def bytes_axis_of_both_kinds(copy: Copy) -> None:
    """A fixed axis that libraries take for a letter: of a choice the last one counts."""
    both = wire(1, 2, wire(1, 0, varint(32)) + wire(2, 2, b"H"))
    axes = wire(1, 2, wire(2, 2, b"B")) + both + wire(1, 2, wire(1, 0, varint(32))) + wire(1, 2, wire(1, 0, varint(3)))
    image = wire(1, 2, b"image") + wire(2, 2, wire(1, 2, wire(1, 0, varint(UINT8)) + wire(2, 2, axes)))
    changed = sound()
    changed.graph.ClearField("output")
    graph = changed.graph.SerializeToString() + wire(12, 2, image)
    changed.ClearField("graph")
    copy.put(changed.SerializeToString() + wire(7, 2, graph))
