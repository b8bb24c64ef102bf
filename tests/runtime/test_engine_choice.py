"""Engines in the manifest: strict reading, and choosing or refusing them before they are opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.bundles import add_fake_engines, fake_host
from fakes.machine import FakeMachine
from msgspec import structs

from gtr_deploy.runtime.bundle.engine_sets import choose_engines, refusal
from gtr_deploy.runtime.bundle.manifest import engine_key
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import BackendError, BundleError
from gtr_deploy.runtime.machine.examine import Gpu, Machine


@pytest.fixture
def bundle(own_bundle: Path) -> Bundle:
    return add_fake_engines(own_bundle)


@pytest.fixture
def host() -> Machine:
    return fake_host(FakeMachine())


def other_gpu(name: str, capability: str) -> Callable[[Machine], Machine]:
    return lambda host: replace(host, gpu=Gpu(name, capability, 1 << 34, "13.0"))


def test_engines_of_this_machine_are_taken(bundle: Bundle, host: Machine) -> None:
    assert refusal(bundle.engine_sets[0], bundle, host) is None
    assert choose_engines(bundle, host, "tensorrt") == bundle.engine_sets[0]


@pytest.mark.parametrize(
    ("change", "both_sides"),
    [
        (lambda h: replace(h, gpu=None, gpu_problem="no NVIDIA driver"), ["need a GPU", "no NVIDIA driver"]),
        (lambda h: replace(h, versions={**h.versions, "tensorrt": None}), ["TensorRT 11.4.0", "not installed"]),
        (lambda h: replace(h, versions={**h.versions, "tensorrt": "10.16.1"}), ["11.4.0", "10.16.1"]),
        (lambda h: replace(h, system="windows-amd64"), ["linux-x86_64", "windows-amd64"]),
        (other_gpu("NVIDIA L4", "8.9"), ["compute capability 9.0", "NVIDIA L4", "8.9"]),
        (other_gpu("NVIDIA H200", "9.0"), ["Fake H100", "NVIDIA H200"]),
    ],
    ids=["gpu", "library", "version", "system", "capability", "model"],
)
def test_every_refusal_names_both_sides_and_the_command(
    bundle: Bundle, host: Machine, change: Callable[[Machine], Machine], both_sides: list[str]
) -> None:
    reason = refusal(bundle.engine_sets[0], bundle, change(host))
    assert reason is not None
    assert "\n" not in reason
    for part in both_sides:
        assert part in reason
    if "not installed" in reason:
        assert "pip install 'gtr-deploy[tensorrt]'" in reason
    elif "GPU:" not in reason:
        assert f"gtr-export engine {bundle.folder} --engine tensorrt" in reason
    with pytest.raises(BackendError, match=both_sides[0]):
        choose_engines(bundle, change(host), "tensorrt")


def test_engines_of_another_graph_or_precision_are_refused(bundle: Bundle, host: Machine) -> None:
    engines = bundle.engine_sets[0]
    backbone = structs.replace(engines.graphs["backbone"], onnx="0" * 64)
    changed = structs.replace(engines, graphs={**engines.graphs, "backbone": backbone})
    reason = refusal(changed, bundle, host)
    assert reason is not None
    assert "backbone engine was built from a graph with sha256 000000000000…" in reason
    assert bundle.graphs["backbone"].model.sha256[:12] in reason
    reason = refusal(structs.replace(engines, precision="fp16"), bundle, host)
    assert reason is not None
    assert "fp16" in reason
    assert "fp32" in reason


def test_hardware_compatible_engines_need_ampere_and_nothing_more(bundle: Bundle, host: Machine) -> None:
    anywhere = structs.replace(bundle.engine_sets[0], hardware_compatible=True, gpu=None)
    assert refusal(anywhere, bundle, other_gpu("NVIDIA L4", "8.9")(host)) is None
    reason = refusal(anywhere, bundle, other_gpu("Tesla T4", "7.5")(host))
    assert reason is not None
    assert "7.5" in reason
    assert "8.0" in reason


def test_ahead_of_time_engines_fit_every_gpu_of_a_listed_capability(bundle: Bundle, host: Machine) -> None:
    ahead = structs.replace(
        bundle.engine_sets[0],
        flavour="tensorrt-rtx",
        version="1.7.1.116",
        gpu=None,
        compute_capabilities=("8.9", "12.0"),
    )
    assert ahead.key == "tensorrt-rtx-1.7.1.116-sm89-sm120"
    for name, capability in (("RTX 4090", "8.9"), ("RTX 5090", "12.0")):
        assert refusal(ahead, bundle, other_gpu(name, capability)(host)) is None
    reason = refusal(ahead, bundle, host)
    assert reason is not None
    assert "8.9, 12.0" in reason


def test_no_engines_names_the_command(own_bundle: Path, host: Machine) -> None:
    with pytest.raises(BackendError, match=r"has no TensorRT-RTX engines; gtr-export engine .* --engine tensorrt-rtx"):
        choose_engines(Bundle.load(own_bundle), host, "tensorrt-rtx")


def test_the_newest_engines_that_fit_win(own_bundle: Path, host: Machine) -> None:
    add_fake_engines(own_bundle)
    bundle = add_fake_engines(own_bundle, plans=("gtr-fast",), max_batch=2)
    assert len(bundle.engine_sets) == 1
    older = structs.replace(bundle.engine_sets[0], version="10.0.0")
    bundle = bundle.with_engines(older)
    assert len(bundle.engine_sets) == 2
    assert choose_engines(bundle, host, "tensorrt").version == "11.4.0"


def test_keys() -> None:
    assert engine_key("tensorrt", "11.4.0", ("9.0",)) == "tensorrt-11.4.0-sm90"
    assert engine_key("tensorrt", "11.4.0", ()) == "tensorrt-11.4.0-any"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["flavour"], "openvino", r'engines\[0\]: flavour "openvino" is not one of tensorrt, '),
        (["precision"], "int4", r'precision "int4" is not one of fp32, '),
        (["version"], 11, r"engines\[0\].version: Expected `str`, got `int`, found 11"),
        (["max_batch"], True, r"engines\[0\].max_batch: Expected `int`, got `bool`, found true"),
        (["max_batch"], 0, "max_batch: Expected `int` >= 1, found 0"),
        (["plans"], ["gtr", 3], r"engines\[0\].plans\[1\]: Expected `str`, got `int`, found 3"),
        (["graphs", "backbone"], None, "graphs.backbone: Expected `object`, got `null`"),
        (["graphs", "extra"], {}, "graphs.extra: Object missing required field `engine`"),
        (["graphs", "decoder", "profiles"], [], "decoder.profiles: Expected `array` of length >= 1, found "),
        (
            ["graphs", "decoder", "profiles"],
            [{"B": [3, 2, 1]}],
            r"decoder: .*B.* \[3, 2, 1\] is not smallest, ",
        ),
        (["graphs", "decoder", "profiles"], [{"B": [1, 2]}], r"decoder.profiles\[0\].B: .*length 3, .*found \[1, 2\]"),
        (["graphs", "decoder", "profiles"], [[1]], r"decoder.profiles\[0\]: Expected `object`, got `array`"),
        (["graphs", "decoder", "layers"], {"fp16": "many"}, 'layers.fp16: Expected `int`, got `str`, found "many"'),
        (["graphs", "decoder", "seconds"], "1", "seconds: Expected `float`, got `str`"),
        (["graphs", "decoder", "onnx"], None, "decoder.onnx: Expected `str`, got `null`"),
        (["graphs", "decoder", "engine", "file"], "../../etc/passwd", "not a path inside the bundle"),
        (["surprise"], 1, r"engines\[0\]: Object contains unknown field `surprise`"),
    ],
    ids=str,
)
def test_a_damaged_manifest_is_refused_in_one_line(bundle: Bundle, path: list[str], value: Any, message: str) -> None:
    manifest_file = bundle.folder / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    entry = manifest["engines"][0]
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    manifest_file.write_text(json.dumps(manifest))

    def opened() -> None:
        damaged = Bundle.load(bundle.folder)
        damaged.engine_paths(damaged.engine_sets[0])

    with pytest.raises(BundleError, match=message) as caught:
        opened()
    assert "\n" not in str(caught.value)


def test_a_changed_engine_file_is_refused(bundle: Bundle) -> None:
    path = bundle.folder / bundle.engine_sets[0].graphs["decoder"].engine.file
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match="bytes, the manifest says"):
        bundle.engine_paths(bundle.engine_sets[0])
