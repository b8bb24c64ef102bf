"""Exported graphs keep their contract: names, dtypes, symbolic axes, opset, one data file; and odd shapes run."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from jobs import ARCHITECTURES
from torch import Tensor, nn

from gtr_deploy.export.build.checkpoints import random_mar
from gtr_deploy.export.build.vae import random_vae_decoder
from gtr_deploy.export.graphs import onnx_export
from gtr_deploy.export.graphs.onnx_export import check_written, export_graph
from gtr_deploy.export.networks import build_graph_module
from gtr_deploy.export.verify.verify import graph_inputs, relative_error
from gtr_deploy.runtime.errors import GtrError
from gtr_deploy.runtime.models.architecture import Decoder
from gtr_deploy.runtime.models.class_conditioner import ClassConditioner
from gtr_deploy.runtime.models.families import graph_specs
from gtr_deploy.runtime.models.graphs import GraphSpec
from gtr_deploy.runtime.models.mar import MarArchitecture

DIGITS = ARCHITECTURES["mar-digits"]
#: Not square, odd, with the VAE: nothing may depend on mar-digits' sizes.
ODD = MarArchitecture(
    name="odd",
    grid=(3, 5),
    token_channels=16,
    classes=7,
    buffer=5,
    width=24,
    depth=2,
    heads=3,
    head_depth=2,
    head_width=40,
    decoder=Decoder(kind="kl", stride=16, scale=0.2325),
)
SEVEN = ClassConditioner(tuple(map(str, range(7))))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_axis_is_symbolic_and_weights_are_in_the_wanted_precision(
    build_digits: Callable[[str], Path], precision: str
) -> None:
    folder = build_digits(precision) / "graphs"
    wanted = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    for kind, spec in graph_specs(DIGITS).items():
        check_written(folder / f"{kind}.onnx", spec, precision)
    for kind, least in (("backbone", 10), ("modulation", 2), ("diffusion_step", 7)):
        model = onnx.load(folder / f"{kind}.onnx")
        types = {i.name: i.data_type for i in model.graph.initializer}
        products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in types]
        in_precision = [n for n in products if types[n.input[1]] == wanted[precision]]
        # Every constant matrix product but the latent projection, with the weight as a plain initializer.
        assert len(in_precision) >= len(products) - 1 >= least - 1
        counts = collections.Counter(n.op_type for n in model.graph.node)
        assert counts["LayerNormalization"] > 0 or kind == "modulation"
        assert not counts["Loop"] + counts["If"] + counts["ScatterND"] + counts["NonZero"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_norms_and_softmax_stay_float32(build_digits: Callable[[str], Path], precision: str) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(build_digits(precision) / "graphs" / "backbone.onnx"))
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
    checked = 0
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT, node.name
            checked += 1
    assert checked >= 8 * 2 + 8


@pytest.fixture(scope="module")
def odd_graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[onnxruntime.InferenceSession, nn.Module]]:
    folder = tmp_path_factory.mktemp("odd")
    weights, vae = random_mar(ODD, 1), random_vae_decoder(ODD, 1)
    graphs = {}
    for kind, spec in graph_specs(ODD).items():
        export_graph(build_graph_module(kind, ODD, weights, vae), spec, "fp32", folder / f"{kind}.onnx")
        session = onnxruntime.InferenceSession(folder / f"{kind}.onnx", providers=["CPUExecutionProvider"])
        graphs[kind] = session, build_graph_module(kind, ODD, weights, vae)
    assert (folder / "decoder.onnx.data").stat().st_size > 100e6
    assert sorted(p.name for p in folder.glob("*.data")) == ["decoder.onnx.data"]
    return graphs


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("backbone", {"G": 1, "B": 1, "V": 0, "P": 1, "R": 0}),
        ("backbone", {"G": 2, "B": 1, "V": 0, "P": 1, "R": 14}),
        ("backbone", {"G": 2, "B": 3, "V": 4, "P": 11, "R": 0}),
        ("backbone", {"G": 1, "B": 2, "V": 14, "P": 1, "R": 0}),
        ("backbone", {"G": 2, "B": 5, "V": 1, "P": 2, "R": 3}),
        ("modulation", {"Q": 1, "T": 1}),
        ("modulation", {"Q": 3, "T": 7}),
        ("diffusion_step", {"G": 1, "N": 1}),
        ("diffusion_step", {"G": 2, "N": 1}),
        ("diffusion_step", {"G": 2, "N": 77}),
        ("detail_score", {"B": 1, "P": 1}),
        ("detail_score", {"B": 4, "P": 9}),
        ("decoder", {"B": 1}),
        ("decoder", {"B": 2}),
    ],
)
def test_any_shape_runs_and_equals_torch(
    odd_graphs: dict[str, tuple[onnxruntime.InferenceSession, nn.Module]], kind: str, sizes: dict[str, int]
) -> None:
    session, module = odd_graphs[kind]
    spec = graph_specs(ODD)[kind]
    inputs = graph_inputs(spec, ODD, SEVEN, sizes, seed=3)
    with torch.inference_mode():
        wanted = module(*(torch.from_numpy(value) for value in inputs.values()))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for found, expected in zip(session.run(None, inputs), wanted, strict=True):
        assert found.shape == expected.shape
        assert relative_error(found, expected.numpy()) <= spec.tolerances["fp32"]


class TestContract:
    @pytest.fixture
    def spec(self) -> GraphSpec:
        return graph_specs(DIGITS)["detail_score"]

    def test_a_frozen_axis_is_noticed(self, tmp_path: Path, spec: GraphSpec) -> None:
        class Frozen(nn.Module):
            def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
                first = z.reshape(3, -1, z.shape[2])  # 3 is the traced batch
                return first.sum(-1), first.amax(-1)

        with pytest.raises(GtrError, match=r"detail_score"):
            export_graph(Frozen(), spec, "fp32", tmp_path / "detail_score.onnx")

    def test_wrong_dtype_opset_and_names(self, tmp_path: Path, spec: GraphSpec) -> None:
        path = tmp_path / "detail_score.onnx"
        export_graph(build_graph_module("detail_score", DIGITS, {}, {}), spec, "fp32", path)
        with pytest.raises(GtrError, match="opset is 20, the manifest says 22"):
            check_written(path, spec, "bf16")
        with pytest.raises(GtrError, match=r"its output is .*score.*, the manifest says .*norm"):
            check_written(path, replace(spec, outputs=spec.outputs[::-1]), "fp32")

    def test_what_the_exporter_cannot_do_is_one_line(self, tmp_path: Path, spec: GraphSpec) -> None:
        class Branching(nn.Module):
            def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
                return (z.sum(-1), z.amax(-1)) if z.sum() > 0 else (z.amax(-1), z.sum(-1))

        with pytest.raises(GtrError, match="could not export the detail_score graph") as caught:
            export_graph(Branching(), spec, "fp32", tmp_path / "x.onnx")
        assert "\n" not in str(caught.value)

    def test_no_program(self, tmp_path: Path, spec: GraphSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onnx_export.torch.onnx, "export", lambda *_, **__: None)
        with pytest.raises(GtrError, match="returned nothing"):
            export_graph(nn.Identity(), spec, "fp32", tmp_path / "x.onnx")


def test_inputs_partition_the_grid() -> None:
    inputs = graph_inputs(graph_specs(ODD)["backbone"], ODD, SEVEN, {"G": 2, "B": 2, "V": 4, "P": 5, "R": 6})
    together = np.concatenate([inputs[name] for name in ("visible", "predict", "context")], axis=1)
    assert (np.sort(together, axis=1) == np.arange(15)).all()
