"""Graphs that look right, and lie when they run: shapes that only the data decides, values that are no numbers.

They are for the checks at run time. Shape inference must not see through them, so every shape comes from the inputs'
values, by way of a zero that no library knows to be one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from graph_cases import FLOAT, INT64, PICTURE, UINT8, Copy, constant, model
from onnx import TensorProto, helper

LIARS: dict[str, Callable[[Copy], None]] = {}
BOMBS: dict[str, Callable[[Copy], None]] = {}
"""These want more memory than there is."""

node = helper.make_node


def _zero(source: str) -> list[onnx.NodeProto]:
    """``zero``: int64 [1], known to be 0 only once it is computed."""
    return [
        node("Mul", [source, "none"], ["nothing"]),
        node("ReduceMax", ["nothing"], ["flat"], keepdims=0),
        node("Cast", ["flat"], ["whole"], to=INT64),
        node("Reshape", ["whole", "one"], ["zero"]),
    ]


_NONE = [constant("none", 0, np.float32), constant("one", [1])]


def picture(dims: Sequence[int], batch: bool = True, dtype: int = UINT8) -> onnx.ModelProto:
    """A decoder whose pictures have another shape than it says, each of its images or one."""
    nodes = [
        *_zero("latents"),
        node("Add", ["dims", "zero"], ["hidden"]),
        node("Shape", ["latents"], ["batch"], start=0, end=1),
        node("Concat", ["batch", "hidden"] if batch else ["hidden"], ["shape"], axis=0),
        node("Expand", ["colour", "shape"], ["image"]),
    ]
    colour = constant("colour", 7, helper.tensor_dtype_to_np_dtype(dtype))
    return model(nodes, [*_NONE, constant("dims", dims), colour])


_PICTURES: dict[str, Callable[[], onnx.ModelProto]] = {
    "picture-small": lambda: picture((8, 8, 3)),
    "picture-wide": lambda: picture((32, 20_000, 3)),
    "picture-grey": lambda: picture((32, 32, 1)),
    "picture-with-alpha": lambda: picture((32, 32, 4)),
    "picture-without-pixels": lambda: picture((0, 0, 3)),
    "picture-flat": lambda: picture((3072,)),
    "picture-of-more-axes": lambda: picture((1, 32, 32, 3)),
    "picture-for-five": lambda: picture((5, *PICTURE[1:]), batch=False),
    "picture-for-none": lambda: picture((0, *PICTURE[1:]), batch=False),
    "picture-for-no-batch": lambda: picture(PICTURE[1:], batch=False),
    "picture-of-float": lambda: picture(PICTURE[1:], dtype=FLOAT),
    "picture-of-int64": lambda: picture(PICTURE[1:], dtype=INT64),
    "picture-of-bool": lambda: picture(PICTURE[1:], dtype=TensorProto.BOOL),
}
for _name, _make in _PICTURES.items():
    LIARS[_name] = lambda copy, make=_make: copy.put(make())


def _tail(kind: str, output: str, nodes: Callable[[str], list[onnx.NodeProto]]) -> Callable[[Copy], None]:
    """The real graph, with more computed from one output; ``nodes`` gets its name and gives ``output``."""

    def change(copy: Copy) -> None:
        changed = onnx.load(copy.graphs / f"{kind}.onnx")
        for each in changed.graph.node:
            for names in (each.input, each.output):
                names[:] = ["honest" if name == output else name for name in names]
        changed.graph.node.extend(nodes("honest"))
        changed.graph.initializer.extend([*_NONE, constant("nan", np.nan, np.float32), constant("all", [-1])])
        changed.graph.initializer.extend([constant("infinite", np.inf, np.float32), constant("first", [0])])
        copy.put(changed, kind)

    return change


_OUTPUTS = {
    "z": "backbone",
    "modulation": "modulation",
    "x_next": "diffusion_step",
    "score": "detail_score",
    "norm": "detail_score",
}
for _output, _kind in _OUTPUTS.items():

    def _lie(name: str, *nodes: onnx.NodeProto, output: str = _output, kind: str = _kind) -> None:
        LIARS[f"{output.replace('_', '-')}-{name}"] = _tail(kind, output, lambda _: list(nodes))

    # Reshapes to a shape of a length that only the data decides: a rank that no inference finds.
    _cut = [*_zero("honest"), node("Shape", ["honest"], ["sizes"])]
    _lie("nan", node("Add", ["honest", "nan"], [_output]))
    _lie("infinite", node("Add", ["honest", "infinite"], [_output]))
    _lie(
        "flat",
        *_cut,
        node("Slice", ["all", "zero", "one"], ["shape"]),
        node("Reshape", ["honest", "shape"], [_output]),
    )
    _lie(
        "one-row",
        *_cut,
        node("Add", ["zero", "one"], ["end"]),
        node("Slice", ["honest", "zero", "end"], ["row"], name="row"),
        node("Slice", ["row", "zero", "end", "last"], [_output]),
        node("Add", ["all", "zero"], ["last"]),
    )
    _lie("none", *_cut, node("Slice", ["honest", "zero", "zero"], [_output]))
    _lie(
        "scalar",
        *_cut,
        node("ReduceMax", ["honest"], ["highest"], keepdims=0),
        node("Slice", ["all", "zero", "zero"], ["shape"]),
        node("Reshape", ["highest", "shape"], [_output]),
    )
    _lie("double", node("Cast", ["honest"], [_output], to=TensorProto.DOUBLE))
    _lie("half", node("Cast", ["honest"], [_output], to=TensorProto.FLOAT16))


def _folded() -> onnx.ModelProto:
    """160 GB of zeros, all constant: a library that computes ahead makes them when it opens the graph."""
    nodes = [
        node("ConstantOfShape", ["huge"], ["zeros"]),
        node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
        node("Add", ["latents", "sum"], ["same"]),
        node("Cast", ["same"], ["image"], to=UINT8),
    ]
    return model(nodes, [constant("huge", [200_000, 200_000])])


BOMBS["picture-of-43-gb"] = lambda copy: copy.put(picture((120_000, 120_000, 3)))
BOMBS["constants-of-160-gb"] = lambda copy: copy.put(_folded())
