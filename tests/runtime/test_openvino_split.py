"""What OpenVINO computes in: hints are always given, and bfloat16 graphs are cut around their network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import relative_error

from gtr_deploy.export.verify.graph_inputs import graph_inputs
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.backends.openvino.backend import OpenVinoBackend
from gtr_deploy.runtime.backends.openvino.library import read_onnx
from gtr_deploy.runtime.backends.openvino.split import split
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.machine.openvino import cpu_capabilities, import_openvino
from gtr_deploy.runtime.models.families import graph_specs
from gtr_deploy.runtime.models.graphs import IMAGE_TOLERANCES, NETWORKS
from gtr_deploy.runtime.pipeline import Pipeline

openvino = import_openvino()
ops = openvino.opset8

HAS_BFLOAT16 = "BF16" in cpu_capabilities(openvino)


@pytest.fixture(scope="module")
def bundle(build_digits: Callable[[str], Path]) -> Bundle:
    return Bundle.load(build_digits("bf16"))


def networks(bundle: Bundle) -> dict[str, Path]:
    paths = bundle.graph_paths(checksums=False)
    return {kind: paths[kind] for kind in NETWORKS}


def parameter(name: str, *shape: int) -> Any:
    made = ops.parameter(list(shape), np.float32, name)
    made.output(0).set_names({name})
    return made


def low(value: Any) -> Any:
    return ops.convert(value, "bf16")


def product(value: Any, lowered: bool = True) -> Any:
    weight = ops.constant(np.eye(4, dtype=np.float32))
    return ops.matmul(low(value) if lowered else value, low(weight) if lowered else weight, False, False)


def high(value: Any) -> Any:
    return ops.convert(value, "f32")


def model(result: Any, *parameters: Any) -> Any:
    made = openvino.Model([ops.result(result)], list(parameters), "made")
    made.outputs[0].set_names({"result"})
    return made


def kinds(part: Any) -> list[str]:
    return [node.get_type_name() for node in part.model.get_ordered_ops()]


class TestCut:
    def test_diffusion_step(self, bundle: Bundle) -> None:
        """The network sees neither raw latents nor modulation in one piece, and none of the arithmetic's inputs."""
        read = read_onnx(openvino, networks(bundle)["diffusion_step"])
        before, network, after = split(openvino, read, "diffusion_step")
        assert [part.lowered for part in (before, network, after)] == [False, True, False]
        assert {"x", "modulation"} <= set(before.inputs)
        assert not {"x", "modulation", "coefficients", "guidance"} & set(network.inputs)
        assert {"x", "coefficients", "guidance", "noise"} <= set(after.inputs)
        assert kinds(before).count("MatMul") == 1
        assert kinds(network).count("MatMul") == 7
        assert "MatMul" not in kinds(after)
        assert "Exp" in kinds(after)
        assert "Exp" not in kinds(network)
        for node in network.model.get_ordered_ops():
            if node.get_type_name() == "MatMul":
                assert node.get_output_element_type(0) == openvino.Type.bf16

    def test_backbone(self, bundle: Bundle) -> None:
        before, network, after = split(openvino, read_onnx(openvino, networks(bundle)["backbone"]), "backbone")
        assert "tokens" in before.inputs
        assert "tokens" not in network.inputs
        assert after.outputs == ("z",)

    def test_a_graph_without_bfloat16_stays_whole(self, bundle: Bundle) -> None:
        (part,) = split(openvino, read_onnx(openvino, networks(bundle)["detail_score"]), "detail_score")
        assert (part.lowered, part.inputs, part.outputs) == (False, ("z",), ("score", "norm"))

    def test_float32_on_one_side_only(self) -> None:
        z, noise = parameter("z", 2, 4), parameter("noise", 2, 4)
        network, after = split(openvino, model(ops.add(high(product(z)), noise), z, noise), "small")
        assert (network.inputs, network.lowered) == (("z",), True)
        assert set(after.inputs) == {*network.outputs, "noise"}
        before, network, after = split(openvino, model(high(product(ops.exp(z))), z), "small")
        assert (before.inputs, before.outputs) == (("z",), network.inputs)
        assert kinds(after) == ["Parameter", "Result"]

    def test_shapes_of_float32_values_are_not_computed_twice(self) -> None:
        x, z = parameter("x", 2, 4), parameter("z", 2, 4)
        reshaped = ops.reshape(product(z), ops.shape_of(product(x, lowered=False)), False)
        before, network, _ = split(openvino, model(high(reshaped), x, z), "small")
        assert kinds(before).count("MatMul") == 1
        assert kinds(network).count("MatMul") == 1

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda z, g: product(high(product(product(high(product(z)), False)))), "float32 product .* is between"),
            (lambda z, g: product(ops.multiply(high(product(z)), g)), "float32 input guidance is read between"),
        ],
        ids=["product", "input"],
    )
    def test_what_cannot_be_kept_in_float32_is_refused(self, make: Callable[[Any, Any], Any], words: str) -> None:
        z, guidance = parameter("z", 2, 4), parameter("guidance", 2, 4)
        last = high(make(z, guidance))
        with pytest.raises(BackendError, match=rf"^the small graph cannot be cut .*{words}.* use an fp32 bundle$"):
            split(openvino, model(ops.add(last, guidance), z, guidance), "small")

    def test_two_nodes_of_one_name_are_refused(self) -> None:
        z = parameter("z", 2, 4)
        first, second = ops.exp(z), high(product(z))
        first.set_friendly_name("twin")
        second.set_friendly_name("twin")
        with pytest.raises(BackendError, match="two of its nodes have the same name"):
            split(openvino, model(ops.add(first, second), z), "small")


class TestHints:
    @pytest.fixture
    def hints(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The hints of all models compiled by the real OpenVINO."""
        given: list[str] = []

        class Recording(openvino.Core):
            def compile_model(self, part: Any, device: str, settings: dict[str, Any]) -> Any:
                given.append(settings["INFERENCE_PRECISION_HINT"].get_type_name())
                return super().compile_model(part, device, settings)

        monkeypatch.setattr(openvino, "Core", Recording)
        return given

    def test_float32_bundles_ask_for_float32(self, digits_bundle: Path, hints: list[str]) -> None:
        OpenVinoBackend(networks(Bundle.load(digits_bundle)), 1)
        assert hints == ["f32"] * len(NETWORKS)

    @pytest.mark.parametrize(("cut", "wanted"), [(True, ["f32", "bf16", "f32"]), (False, ["f32"])])
    def test_bfloat16_graphs(self, bundle: Bundle, hints: list[str], cut: bool, wanted: list[str]) -> None:
        paths = {kind: networks(bundle)[kind] for kind in ("diffusion_step", "detail_score")}
        description = OpenVinoBackend(paths, 1, cut=cut).description
        assert hints == [*wanted, "f32"]
        lowered = HAS_BFLOAT16 and cut
        assert description == f"openvino cpu, {'bfloat16' if lowered else 'bfloat16 graphs in float32'}"

    def test_a_hint_that_is_not_heeded_is_an_error(self, digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Such as on a CPU whose default is bfloat16; OpenVINO's answer is made up."""

        class Lowering(openvino.Core):
            def compile_model(self, part: Any, device: str, settings: dict[str, Any]) -> Any:
                class Compiled:
                    def get_property(self, name: str) -> Any:
                        return openvino.Type.bf16

                return Compiled()

        monkeypatch.setattr(openvino, "Core", Lowering)
        with pytest.raises(BackendError, match=r"^OpenVINO would compute in bf16 in place of f32$"):
            OpenVinoBackend({"decoder": networks(Bundle.load(digits_bundle))["decoder"]})


class TestNumbers:
    def test_cutting_changes_nothing_else(self, bundle: Bundle) -> None:
        """Without bfloat16 in the CPU, cutting changes nothing; with it, no more than the precision may cost."""
        paths = networks(bundle)
        plain, other = OpenVinoBackend(paths, 1, cut=False), OpenVinoBackend(paths, 1, cut=True)
        for kind in NETWORKS:
            spec = graph_specs(bundle.architecture, 2)[kind]
            for sizes in (spec.smallest, spec.usual):
                inputs = graph_inputs(spec, bundle.architecture, bundle.conditioner, sizes)
                for found, wanted in zip(other.run(kind, inputs), plain.run(kind, inputs), strict=True):
                    limit = spec.tolerances["bf16"] if HAS_BFLOAT16 else 1e-6
                    assert relative_error(found, wanted) <= limit

    @pytest.mark.parametrize("cut", [True, None])
    def test_images_are_those_of_the_float32_bundle(
        self, bundle: Bundle, digits_bundle: Path, cut: bool | None
    ) -> None:
        wide = OnnxRuntimeBackend(networks(Bundle.load(digits_bundle)), 1)
        found, wanted = (
            Pipeline(bundle.architecture, bundle.conditioner, backend, dict(bundle.plan_defaults)).generate(
                [3, 7], plan="gtr-fast"
            )
            for backend in (OpenVinoBackend(networks(bundle), 1, cut=cut), wide)
        )
        assert 0 < relative_error(found.latents, wanted.latents) <= IMAGE_TOLERANCES["bf16"]
