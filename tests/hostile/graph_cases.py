"""Graphs as an attacker would put them into a bundle, found out by looking: their files never reach an engine library.

Each case changes a copy of the shipped model's bundle; :func:`seal` then makes the manifest agree with what lies there,
since whoever makes the bundle makes the manifest. Graphs that look right and lie at run time are in graph_liars.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SECRET = b"TOPSECRET" + bytes(range(256)) * 48
PICTURE = (1, 32, 32, 3)

FLOAT, UINT8, INT64 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64
LATENTS = helper.make_tensor_value_info("latents", FLOAT, ["B", 64, 16])
IMAGE = helper.make_tensor_value_info("image", UINT8, ["B", *PICTURE[1:]])


@dataclass
class Copy:
    """A bundle to be spoilt, and a file beside it that is none of its business.

    Attributes:
        folder, secret: the bundle and the file.
        data: graph kind to the data file that the manifest shall list, relative to ``folder``.
    """

    folder: Path
    secret: Path
    data: dict[str, str] = field(default_factory=dict)

    @property
    def graphs(self) -> Path:
        return self.folder / "graphs"

    def put(self, model: onnx.ModelProto | bytes, kind: str = "decoder") -> None:
        """Writes a graph."""
        content = model if isinstance(model, bytes) else model.SerializeToString()
        (self.graphs / f"{kind}.onnx").write_bytes(content)

    def list_data(self, content: bytes, kind: str = "decoder") -> None:
        """Writes a data file, for the manifest to list."""
        self.data[kind] = f"graphs/{kind}.onnx.data"
        (self.folder / self.data[kind]).write_bytes(content)

    def seal(self) -> None:
        """Sizes and checksums in the manifest are those of the files."""
        path = self.folder / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for kind, entry in manifest["graphs"].items():
            entry["model"] = self._stored(entry["model"]["file"])
            entry["data"] = self._stored(self.data[kind]) if kind in self.data else entry["data"]
        path.write_text(json.dumps(manifest), encoding="utf-8")

    def _stored(self, file: str) -> dict[str, Any]:
        content = (self.folder / file).read_bytes()
        return {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


CASES: dict[str, Callable[[Copy], None]] = {}


def case(function: Callable[[Copy], None]) -> Callable[[Copy], None]:
    CASES[function.__name__.strip("_").replace("_", "-")] = function
    return function


def model_case(name: str, make: Callable[[], onnx.ModelProto | bytes], kind: str = "decoder") -> None:
    CASES[name] = lambda copy: copy.put(make(), kind)


def model(
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[TensorProto] = (),
    inputs: Sequence[onnx.ValueInfoProto] = (LATENTS,),
    outputs: Sequence[onnx.ValueInfoProto] = (IMAGE,),
    opsets: Sequence[tuple[str, int]] = (("", 20),),
) -> onnx.ModelProto:
    """A decoder with everything in its place that is not given."""
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializer=initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in opsets], ir_version=10)


def constant(name: str, values: Any, dtype: Any = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)


def showing(weight: TensorProto, *more: TensorProto) -> onnx.ModelProto:
    """Every picture is the weight ``w``: what is read with it can be seen."""
    nodes = [
        helper.make_node("Shape", ["latents"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "sizes"], ["shape"], axis=0),
        helper.make_node("Expand", ["w", "shape"], ["image"]),
    ]
    return model(nodes, [weight, *more, constant("sizes", PICTURE[1:])])


def tensor(dims: Sequence[int] = PICTURE, kind: int = UINT8, name: str = "w", **values: Any) -> TensorProto:
    return TensorProto(name=name, dims=dims, data_type=kind, **values)


def external(location: str | None, *pairs: tuple[str, str], sized: bool = True, **more: Any) -> TensorProto:
    """The weight ``w`` from a file, all of the right size if nothing else is said."""
    weight = tensor(data_location=TensorProto.EXTERNAL, **more)
    place = [("location", location)] if location is not None else []
    if sized:
        place += [("offset", "0"), ("length", "3072")]
    for key, value in (*place, *pairs):
        weight.external_data.add(key=key, value=value)
    return weight


def sound() -> onnx.ModelProto:
    """A decoder that nobody minds."""
    return showing(tensor(raw_data=bytes(3072)))


# Files of the machine.
for _name, _location in {
    "parent": "../../secret.bin",
    "far-parent": "../" * 30 + "etc/passwd",
    "dev-zero": "/dev/zero",
    "environment": "/proc/self/environ",
    "memory": "*/_ORT_MEM_ADDR_/*",
    "backslash": "..\\..\\secret.bin",
    "url": "file:///etc/passwd",
    "itself": "decoder.onnx",
    "other-graph": "backbone.onnx",
    "nothing-there": "nowhere.bin",
    "empty-location": "",
    "nul": "decoder.onnx.data\0",
    "dot": "./decoder.onnx.data",
}.items():

    def _external(copy: Copy, location: str = _location) -> None:
        copy.list_data(bytes(3072))
        copy.put(showing(external(location)))

    CASES[f"external-{_name}"] = _external


@case
def external_absolute(copy: Copy) -> None:
    copy.put(showing(external(str(copy.secret))))


@case
def external_link(copy: Copy) -> None:
    (copy.graphs / "w.bin").symlink_to(copy.secret)
    copy.put(showing(external("w.bin")))


@case
def external_through_a_linked_folder(copy: Copy) -> None:
    (copy.graphs / "sub").symlink_to(copy.secret.parent)
    copy.put(showing(external("sub/secret.bin")))


@case
def external_hard_link(copy: Copy) -> None:
    os.link(copy.secret, copy.graphs / "w.bin")
    copy.put(showing(external("w.bin")))


@case
def external_hard_link_in_place_of_the_listed(copy: Copy) -> None:
    copy.list_data(bytes(len(SECRET)))
    copy.put(showing(external("decoder.onnx.data")))
    copy.seal()
    (copy.graphs / "decoder.onnx.data").unlink()
    os.link(copy.secret, copy.graphs / "decoder.onnx.data")


@case
def external_unlisted(copy: Copy) -> None:
    (copy.graphs / "decoder.onnx.data").write_bytes(bytes(3072))
    copy.put(showing(external("decoder.onnx.data")))


@case
def external_other_than_listed(copy: Copy) -> None:
    copy.list_data(bytes(3072))
    (copy.graphs / "w.bin").write_bytes(bytes(3072))
    copy.put(showing(external("w.bin")))


@case
def external_listed_under_another_name(copy: Copy) -> None:
    copy.data["decoder"] = "graphs/w.bin"
    (copy.graphs / "w.bin").write_bytes(bytes(3072))
    copy.put(showing(external("w.bin")))


@case
def external_pipe(copy: Copy) -> None:
    os.mkfifo(copy.graphs / "w.bin")
    copy.put(showing(external("w.bin")))


@case
def external_listed_pipe(copy: Copy) -> None:
    copy.list_data(b"")
    copy.put(showing(external("decoder.onnx.data")))
    copy.seal()
    (copy.graphs / "decoder.onnx.data").unlink()
    os.mkfifo(copy.graphs / "decoder.onnx.data")


@case
def model_is_a_pipe(copy: Copy) -> None:
    (copy.graphs / "decoder.onnx").unlink()
    os.mkfifo(copy.graphs / "decoder.onnx")


@case
def model_is_a_link(copy: Copy) -> None:
    (copy.graphs / "decoder.onnx").unlink()
    (copy.graphs / "decoder.onnx").symlink_to(copy.secret)


@case
def external_weight_of_the_backbone(copy: Copy) -> None:
    changed = onnx.load(copy.graphs / "backbone.onnx")
    weight = max(changed.graph.initializer, key=lambda found: len(found.raw_data))
    copy.secret.write_bytes(weight.raw_data)
    size = len(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../secret.bin"), ("offset", "0"), ("length", str(size))):
        weight.external_data.add(key=key, value=value)
    copy.put(changed, "backbone")


# The listed file, at a place that is not there or not clear. The first pair of a key is another's.
for _name, _pairs in {
    "offset-beyond": (("offset", "1"), ("length", "3072")),
    "offset-negative": (("offset", "-1"), ("length", "3072")),
    "offset-huge": (("offset", str(2**62)), ("length", "3072")),
    "offset-wraps": (("offset", str(2**64)), ("length", "3072")),
    "offset-text": (("offset", "0x10"), ("length", "3072")),
    "offset-spaced": (("offset", " 0"), ("length", "3072")),
    "offset-other-digits": (("offset", "٠"), ("length", "3072")),
    "offset-empty": (("offset", ""), ("length", "3072")),
    "offset-4000-digits": (("offset", "9" * 4000), ("length", "3072")),
    "length-beyond": (("length", "4096"),),
    "length-short": (("length", "16"),),
    "length-zero": (("length", "0"),),
    "length-negative": (("length", "-3072"),),
    "offset-twice": (("offset", "0"), ("offset", "0"), ("length", "3072")),
    "location-twice": (("location", "../../secret.bin"),),
    "unknown-key": (("prefix", "/"),),
    "checksum-key": (("checksum", "0" * 40),),
    "basepath-key": (("basepath", "/"),),
}.items():

    def _place(copy: Copy, pairs: tuple[tuple[str, str], ...] = _pairs) -> None:
        copy.list_data(bytes(3072))
        copy.put(showing(external("decoder.onnx.data", *pairs, sized=False)))

    CASES[f"place-{_name}"] = _place


@case
def place_without_location(copy: Copy) -> None:
    copy.list_data(bytes(3072))
    copy.put(showing(external(None)))


@case
def place_without_entries(copy: Copy) -> None:
    copy.list_data(bytes(3072))
    copy.put(showing(external(None, sized=False)))


@case
def place_with_raw_data(copy: Copy) -> None:
    copy.list_data(bytes(3072))
    copy.put(showing(external("decoder.onnx.data", raw_data=bytes(3072))))


@case
def place_with_typed_values(copy: Copy) -> None:
    copy.list_data(bytes(3072))
    copy.put(showing(external("decoder.onnx.data", int32_data=[1] * 3072)))


@case
def place_without_being_said_to_be_external(copy: Copy) -> None:
    weight = external("../../secret.bin")
    weight.ClearField("data_location")
    copy.put(showing(weight))


@case
def place_in_an_attribute(copy: Copy) -> None:
    copy.list_data(bytes(3072))
    changed = showing(tensor(name="unused", raw_data=bytes(3072)))
    changed.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=external("decoder.onnx.data")))
    copy.put(changed)


@case
def place_in_a_shape_attribute(copy: Copy) -> None:
    """ConstantOfShape's value is a tensor, too."""
    changed = sound()
    value = external(str(copy.secret), dims=(1,), name="v", sized=False)
    changed.graph.node.append(helper.make_node("ConstantOfShape", ["sizes"], ["more"], value=value))
    copy.put(changed)


def spoil(source: Path, target: Path, secret: Path, change: Callable[[Copy], None]) -> Copy:
    """A copy of a bundle with one case in it, sealed."""
    shutil.copytree(source, target)
    secret.write_bytes(SECRET)
    copy = Copy(target, secret)
    before = (target / "manifest.json").read_bytes()
    change(copy)
    if (target / "manifest.json").read_bytes() == before:  # a case may seal earlier, and then change the files
        with_fifos = [path for path in copy.graphs.iterdir() if path.is_fifo() and path.suffix == ".onnx"]
        if not with_fifos:
            copy.seal()
    return copy
