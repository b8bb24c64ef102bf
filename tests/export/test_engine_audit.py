"""Which precision an engine has: the inspector's JSON as TensorRT 10 and 11 write it, and the rule that judges it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gtr_deploy.export.engines.audit import Audit, counted, float32_problem, inspected_layers, precision_of


def _ten(name: str, kind: str, read: str, written: str) -> dict[str, Any]:
    """A layer as TensorRT 10 describes it with DETAILED verbosity."""

    def tensor(label: str, told: str) -> dict[str, Any]:
        return {"Name": label, "Location": "Device", "Dimensions": [2, 64, 128], "Format/Datatype": told}

    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor("in", read)],
        "Outputs": [tensor("out", written)],
        "ParameterType": "Convolution",
        "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32",
        "StreamId": 0,
        "Metadata": "[ONNX Layer: node_MatMul_12]",
    }


def _eleven(name: str, kind: str, read: str, written: str) -> dict[str, Any]:
    """The same from TensorRT 11, which tells type and format apart."""
    layer = _ten(name, kind, "", "")
    for side, told in (("Inputs", read), ("Outputs", written)):
        layer[side] = [{"Name": "t", "Dimensions": [2, 64, 128], "DataType": told, "Format": "kLINEAR"}]
    return layer


@pytest.mark.parametrize("make", [_ten, _eleven])
def test_products_alone_count(make: Any) -> None:
    layers = [
        make("__myl_MatMul_1", "gemm", "Half", "Half"),
        make("__myl_MatMul_2", "gemm", "Half", "Float"),
        make("node_conv", "CaskConvolution", "Half", "Half"),
        make("__mye_attention", "mha", "Half", "Half"),
        make("norm", "kgen", "Float", "Float"),
        make("Reformatting CopyNode", "Reformat", "Float", "Half"),
        make("last", "gemm", "Float", "Float"),
    ]
    assert inspected_layers(json.dumps({"Layers": layers, "Bindings": ["x"]})) == {"fp16": 4, "fp32": 1}


def test_products_in_generated_kernels_are_told_by_name() -> None:
    layers = [
        _eleven("__myl_FcMulAdd_myl0_3", "kgen", "Half", "Half"),
        _eleven("__myl_MhaTran_myl0_4", "kgen", "Half", "Half"),
        _eleven("__myl_CastMulSum_myl0_5", "kgen", "Float", "Half"),
        _eleven("__myl_MatMulAdd_myl0_6", "kgen", "Float", "Float"),
    ]
    assert inspected_layers(json.dumps({"Layers": layers})) == {"fp16": 2, "fp32": 1}


def test_fused_layers_of_unknown_type_are_told_by_name() -> None:
    layers = [
        _ten("{ForeignNode[node_MatMul_1...node_Add_9]}", "Myelin", "BFloat16", "Float"),
        _ten("{ForeignNode[node_Gather_1...node_Add_9]}", "Myelin", "Float", "Float"),
    ]
    assert inspected_layers(json.dumps({"Layers": layers})) == {"bf16": 1}


def test_without_kinds_every_layer_counts() -> None:
    layers = [_ten("a", "", "Int64", "Half"), _ten("b", "", "Float", "Float"), _ten("c", "", "Int64", "Bool")]
    assert inspected_layers(json.dumps({"Layers": layers})) == {"fp16": 1, "fp32": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{}",
        '{"Layers": null}',
        '{"Layers": ["node_MatMul_1", "node_MatMul_2"]}',
        '{"Layers": [{"Name": "x", "LayerType": "gemm", "Inputs": ["y"], "Outputs": null}]}',
        '{"Layers": [{"Name": "x", "LayerType": "kgen", "Inputs": [], "Outputs": []}]}',
    ],
)
def test_text_that_tells_nothing(text: str) -> None:
    assert inspected_layers(text) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("Int8", "int8"),
        ("FP8", "fp8"),
        ("DataType.HALF", "fp16"),
        ("DataType.FLOAT", "fp32"),
        ("DataType.BF16", "bf16"),
        ("Row major linear FP16 format (kLINEAR)", "fp16"),
        ("Row major linear FP32", "fp32"),
        ("Row major linear BFloat16 format", "bf16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Row major Int8 format", "int8"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("UInt8", None),
        ("Int64", None),
        ("Bool", None),
        ("", None),
    ],
)
def test_names_of_types(text: str, name: str | None) -> None:
    assert precision_of(text) == name


@pytest.mark.parametrize(
    ("layers", "precision", "wrong"),
    [
        ({"fp32": 9}, "fp32", False),
        ({"fp16": 9}, "fp16", False),
        ({"fp16": 5, "fp32": 5}, "fp16", False),
        ({"fp16": 4, "fp32": 5}, "fp16", True),
        ({"fp32": 9}, "bf16", True),
        ({"int8": 6, "fp32": 3}, "int8", False),
        ({"fp32": 3}, "int8", True),
        ({}, "fp16", False),
        (None, "fp16", False),
    ],
)
def test_mostly_float32_is_a_problem(layers: dict[str, int] | None, precision: str, wrong: bool) -> None:
    problem = float32_problem(layers, precision)
    assert bool(problem) == wrong
    if problem and layers:
        total = sum(layers.values())
        assert problem.startswith(f"{layers['fp32']} of {total} matrix products run in fp32 although")


def test_words() -> None:
    assert counted({"fp16": 84, "fp32": 2}) == "84 fp16 and 2 fp32 matrix products"
    assert Audit({"fp16": 84}, "engine inspector").line() == "84 fp16 matrix products (engine inspector)"
    assert Audit({}, "engine inspector").line() == "no matrix products"
