"""Q/DQ graphs: where the pairs sit, what they compute, that engines build, and that bad calibration shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from calibrated import Calibrated

from gtr_deploy.calibration.collect import Collector
from gtr_deploy.calibration.layers import QUANTISED_KINDS, Layer, quantisable, read_graph, weight_values
from gtr_deploy.calibration.probes import image_errors, outputs
from gtr_deploy.calibration.quantize import FLAVOURS, activation_scale, quantise_graph, quantised_weight
from gtr_deploy.calibration.ranges import Range, Statistics, layer_ranges
from gtr_deploy.calibration.sensitivity import GATES
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.errors import BundleError, UsageError

OUTPUT_KINDS = ("backbone", "diffusion_step")
"""What has errors: modulation counts by what the head makes of it."""


@pytest.fixture(scope="module")
def quantised(calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Flavour to graph kind to file."""
    folder = tmp_path_factory.mktemp("quantised")
    found: dict[str, dict[str, Path]] = {}
    for flavour in FLAVOURS:
        found[flavour] = {kind: folder / flavour / f"{kind}.onnx" for kind in QUANTISED_KINDS}
        for kind, path in found[flavour].items():
            quantise_graph(calibrated.graphs[kind], path, calibrated.ranges(flavour), flavour)
    return found


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kind", QUANTISED_KINDS)
def test_pairs_sit_straight_before_the_products(
    quantised: dict[str, dict[str, Path]], calibrated: Calibrated, flavour: str, kind: str
) -> None:
    path = quantised[flavour][kind]
    onnx.checker.check_model(str(path))
    model = read_graph(path)
    made = {output: node for node in model.graph.node for output in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [
        node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in made
        and made[node.input[1]].op_type == "DequantizeLinear"
    ]  # fmt: skip
    assert len(products) == len(quantisable(read_graph(calibrated.graphs[kind])))
    for product in products:
        activation, weight = made[product.input[0]], made[product.input[1]]
        assert (activation.op_type, made[activation.input[0]].op_type) == ("DequantizeLinear", "QuantizeLinear")
        values = stored[weight.input[0]]
        assert values.data_type == FLAVOURS[flavour].weight
        assert len(stored[weight.input[1]].dims) == 1  # per channel
        assert stored[activation.input[2]].data_type == FLAVOURS[flavour].activation
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) == len(products)  # nothing else is quantised: no index path, no norm, no attention product
    opset = {entry.domain: entry.version for entry in model.opset_import}
    assert opset == {"": 20}


def test_sizes_and_contract(quantised: dict[str, dict[str, Path]], calibrated: Calibrated) -> None:
    for kind in QUANTISED_KINDS:
        original = read_graph(calibrated.graphs[kind])
        for files in quantised.values():
            model = read_graph(files[kind])
            assert [v.SerializeToString() for v in model.graph.input] == [
                v.SerializeToString() for v in original.graph.input
            ]
            assert [v.name for v in model.graph.output] == [v.name for v in original.graph.output]
            # The head's timestep table is looked up, not multiplied with, and is a third of this small head.
            kept = sum(len(tensor.raw_data) for tensor in model.graph.initializer if tensor.name.endswith(".table"))
            size, whole = files[kind].stat().st_size, calibrated.graphs[kind].stat().st_size
            assert size - kept < 0.36 * (whole - kept)


@pytest.mark.parametrize(("flavour", "z", "eps"), [("cpu", 0.02, 0.04), ("tensorrt", 0.02, 0.04), ("fp8", 0.05, 0.06)])
def test_errors_of_the_graphs(
    quantised: dict[str, dict[str, Path]], calibrated: Calibrated, flavour: str, z: float, eps: float
) -> None:
    for kind, limit in zip(OUTPUT_KINDS, (z, eps), strict=True):
        calls = calibrated.probes.inputs[kind]
        found = outputs(quantised[flavour], kind, calls, 1, optimised=flavour == "cpu")
        assert calibrated.probes.error(kind, found) < limit


def test_the_cpu_computes_what_the_graph_says(quantised: dict[str, dict[str, Path]], calibrated: Calibrated) -> None:
    """7-bit weights cannot saturate: fused integer kernels are as near to float32 as plain arithmetic on the same Q/DQ.

    8-bit ones are not on CPUs without VNNI: z is 4.1 % off there, and 0.7 % in plain arithmetic.
    """
    for kind in OUTPUT_KINDS:
        calls, graphs = calibrated.probes.inputs[kind], quantised["cpu"]
        fused, plain = outputs(graphs, kind, calls, 1), outputs(graphs, kind, calls, 1, optimised=False)
        assert calibrated.probes.error(kind, fused) < 1.15 * calibrated.probes.error(kind, plain)


def test_agrees_with_onnxruntime_quantization(calibrated: Calibrated, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    source = calibrated.graphs["diffusion_step"]
    layers = quantisable(read_graph(source))
    data = {}
    for layer in layers:
        seen = calibrated.collected.all[layer.name]
        data[layer.activation] = TensorData(lowest=np.float32(seen.low), highest=np.float32(seen.high))
    model = onnx.load(source)
    names = [model.graph.node[layer.node].name for layer in layers]
    quantizer = QDQQuantizer(
        model, True, False, QuantType.QInt8, QuantType.QInt8, TensorsData(CalibrationMethod.MinMax, data), names, [],
        ["MatMul"], {"ActivationSymmetric": True, "WeightSymmetric": True, "OpTypesToExcludeOutputQuantization":
        ["MatMul"], "DedicatedQDQPair": True, "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}},
    )  # fmt: skip
    assert QuantFormat.QDQ.name == "QDQ"
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(tmp_path / "theirs.onnx"))
    ranges = layer_ranges(calibrated.collected.all, "max", True, 100)
    quantise_graph(source, tmp_path / "ours.onnx", ranges, "tensorrt")
    calls = calibrated.probes.inputs["diffusion_step"]
    ours, theirs = (
        outputs({**calibrated.graphs, "diffusion_step": tmp_path / name}, "diffusion_step", calls, 1, optimised=False)
        for name in ("ours.onnx", "theirs.onnx")
    )
    assert calibrated.probes.error("diffusion_step", ours) == pytest.approx(
        calibrated.probes.error("diffusion_step", theirs), rel=0.1
    )


def _random_statistics(calibrated: Calibrated, scale: float) -> dict[str, Statistics]:
    """Ranges from inputs that no sampler has made."""
    collector = Collector({kind: calibrated.graphs[kind] for kind in QUANTISED_KINDS})
    backend = OnnxRuntimeBackend(collector.graphs, threads=1)
    backend.hook = collector
    rng = np.random.default_rng(0)
    for kind in OUTPUT_KINDS:
        for call in calibrated.probes.inputs[kind]:
            noise = {
                name: (scale * rng.standard_normal(value.shape)).astype(np.float32)
                if value.dtype == np.float32
                else value
                for name, value in call.items()
            }
            if kind == "diffusion_step":
                made, *_ = backend.run("modulation", {name: noise.pop(name) for name in ("z", "row", "timestep")})
                shape = (-1, len(noise["x"]), made.shape[1])
                noise["modulation"] = (scale * rng.standard_normal(made.shape)).astype(np.float32).reshape(shape)
            backend.run(kind, noise)
    return {
        name: collector.watched[kind][tensor]
        for kind, layers in collector.layers.items()
        for name, tensor in layers.items()
    }


def test_a_bad_calibration_is_measurably_worse(calibrated: Calibrated, tmp_path: Path) -> None:
    """Random inputs, a tenth of the real ones' size: the ranges are too narrow, and the gate says so."""
    medians = {}
    for name, seen in (("good", calibrated.collected.all), ("bad", _random_statistics(calibrated, 0.1))):
        graphs = dict(calibrated.graphs)
        for kind in QUANTISED_KINDS:
            graphs[kind] = tmp_path / name / f"{kind}.onnx"
            quantise_graph(calibrated.graphs[kind], graphs[kind], layer_ranges(seen, "mse", True, 100), "tensorrt")
        backend = OnnxRuntimeBackend(graphs, 1, "cpu", optimised=False)
        errors = image_errors(calibrated.architecture, backend, calibrated.plan, calibrated.probes)
        medians[name] = float(np.median(errors))
    assert medians["good"] < GATES["tensorrt"] < medians["bad"]
    assert medians["bad"] > 5 * medians["good"]


@pytest.mark.parametrize("flavour", ["tensorrt", "fp8"])
@pytest.mark.parametrize("kind", QUANTISED_KINDS)
def test_tensorrt_rtx_builds_the_graphs(quantised: dict[str, dict[str, Path]], flavour: str, kind: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(quantised[flavour][kind]))
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    sizes = {"tokens": (2, 20), "visible": (2, 20), "predict": (2, 8), "context": (2, 20)}
    sizes |= {"labels": (2, 2), "modulation": (2, 8)}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        known = iter(sizes.get(tensor.name, (8,)))
        shape = [next(known) if axis == -1 else axis for axis in tensor.shape]
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None


def test_float16_graphs_keep_their_precision(build_digits, calibrated: Calibrated, tmp_path: Path) -> None:
    source = build_digits("fp16") / "graphs" / "diffusion_step.onnx"
    target = tmp_path / "half.onnx"
    quantise_graph(source, target, calibrated.ranges("tensorrt"), "tensorrt")
    scales = [t for t in read_graph(target).graph.initializer if t.name.endswith(".input_scale")]
    assert {scale.data_type for scale in scales} == {onnx.TensorProto.FLOAT16}
    calls, graphs = calibrated.probes.inputs["diffusion_step"], {**calibrated.graphs, "diffusion_step": target}
    found = outputs(graphs, "diffusion_step", calls, 1, optimised=False)
    assert calibrated.probes.error("diffusion_step", found) < 0.04


def test_gemm_and_large_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gemm with a transposed weight, kept and shared weights, and one data file beside the graph."""
    from gtr_deploy.calibration import quantize

    monkeypatch.setattr(quantize, "EXTERNAL_DATA_BYTES", 1000)
    rng = np.random.default_rng(0)
    weight, square = rng.standard_normal((24, 16)).astype(np.float32), rng.standard_normal((24, 24)).astype(np.float32)
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "a.weight", "bias"], ["h"], transB=1),
            helper.make_node("MatMul", ["h", "b.weight"], ["m"]),
            helper.make_node("MatMul", ["m", "b.weight"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 16])],
        [helper.make_tensor_value_info("y", 1, ["N", 24])],
        [
            onnx.numpy_helper.from_array(value, name)
            for name, value in (("a.weight", weight), ("b.weight", square), ("bias", weight[:, 0].copy()))
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, str(source), save_as_external_data=True, location="in.onnx.data", size_threshold=0)
    layers = quantisable(read_graph(source))
    assert [(layer.name, layer.shape, layer.axis) for layer in layers[:2]] == [("a", (16, 24), 0), ("b", (24, 24), 1)]
    np.testing.assert_array_equal(weight_values(read_graph(source), "a.weight", tmp_path), weight)
    quantise_graph(source, target, {"a": Range(-4, 4)}, "tensorrt", only=["a"])
    assert (tmp_path / "out.onnx.data").is_file()
    x = {"x": rng.standard_normal((5, 16)).astype(np.float32)}
    before, after = outputs({"g": source}, "g", [x], 1)[0], outputs({"g": target}, "g", [x], 1, optimised=False)[0]
    assert np.linalg.norm(after - before) / np.linalg.norm(before) < 0.03


def test_scales() -> None:
    assert activation_scale(Range(-2, 1), FLAVOURS["tensorrt"]) == (2 / 127, 0)
    assert activation_scale(Range(-2, 1), FLAVOURS["fp8"]) == (2 / 448, 0)
    assert activation_scale(Range(-1, 3), FLAVOURS["cpu"]) == (4 / 255, 64)
    assert activation_scale(Range(1, 3), FLAVOURS["cpu"]) == (3 / 255, 0)  # 0 must be a level
    assert activation_scale(Range(0, 0), FLAVOURS["cpu"])[0] > 0
    values, scale = quantised_weight(np.array([[0.5, 0.0], [-2.0, 0.0]], np.float32), 1, FLAVOURS["cpu"])
    assert values.tolist() == [[16, 0], [-63, 0]]
    assert scale[0] == pytest.approx(2 / 63)
    assert scale[1] > 0


def test_bad_requests_are_one_line(calibrated: Calibrated, tmp_path: Path) -> None:
    source, target = calibrated.graphs["diffusion_step"], tmp_path / "x.onnx"
    with pytest.raises(UsageError, match=r"no activation range for head\.res_blocks\.0\.mlp\.0"):
        quantise_graph(source, target, {}, "cpu")
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x00garbage")
    for name, message in (("bad.onnx", "not an ONNX graph"), ("gone.onnx", "missing")):
        with pytest.raises(BundleError, match=message):
            read_graph(tmp_path / name)


def test_groups() -> None:
    layer = Layer("decoder_blocks.3.mlp.fc1", 0, "x", "w", (1, 1), 1)
    assert layer.group == "decoder_blocks.*.mlp.fc1"
