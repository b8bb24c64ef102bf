"""gtr-export verify and the two commands of gtr-run over engines, on the fake CUDA and TensorRT."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from fakes.bundles import add_fake_engines, fake_host
from fakes.machine import FakeMachine
from msgspec import to_builtins

from gtr_deploy.export.verify import verify as verify_module
from gtr_deploy.export.verify.graph_inputs import covered_presets
from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.machine import examine as machine_module
from gtr_deploy.runtime.sampling.plan import preset, resolve


@pytest.fixture
def on_fake(fake_gpu: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    for module in (machine_module, verify_module):
        monkeypatch.setattr(module, "examine_machine", lambda: fake_host(fake_gpu))
    return fake_gpu


@pytest.mark.usefixtures("on_fake")
def test_verify_climbs_with_the_engines(own_bundle: Path, export_cli: Callable[..., Result]) -> None:
    add_fake_engines(own_bundle, plans=("gtr-fast",))
    done = export_cli("verify", own_bundle, "--backend", "tensorrt", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["rung_reached"] == "images"
    assert report["evaluated_with"] == "tensorrt-11.4.0-sm90"
    images = [check for check in report["checks"] if check["rung"] == "images"]
    assert [check["subject"] for check in images] == ["plan gtr-fast, torch fp32"]
    assert (own_bundle / "reports" / "parity-tensorrt.json").is_file()


@pytest.mark.usefixtures("on_fake")
def test_engines_that_compute_something_else_fail(own_bundle: Path, export_cli: Callable[..., Result]) -> None:
    bundle = add_fake_engines(own_bundle, plans=("gtr-fast",))
    folder = bundle.folder / "engines" / bundle.engine_sets[0].key
    wrong = (own_bundle / "graphs" / "diffusion_step.onnx").read_bytes()
    other = own_bundle.parent / "wrong.onnx"
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(wrong)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(model, str(other))
    engine = json.loads((folder / "diffusion_step.engine").read_text())
    (folder / "diffusion_step.engine").write_text(json.dumps({**engine, "onnx": str(other)}))
    add_changed(bundle.folder, folder / "diffusion_step.engine")
    done = export_cli("verify", own_bundle, "--backend", "tensorrt", "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["rung_reached"] == "finite"
    failed = {check["subject"].split(",")[0] for check in report["checks"] if check["status"] == "failed"}
    assert failed == {"diffusion_step"}


def add_changed(folder: Path, file: Path) -> None:
    """The manifest's size and checksum of an engine that was replaced on purpose."""
    from gtr_deploy.runtime.bundle.manifest import StoredFile

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    graph = manifest["engines"][0]["graphs"][file.stem]
    graph["engine"] = to_builtins(StoredFile.of(folder, str(file.relative_to(folder))))
    path.write_text(json.dumps(manifest))


@pytest.mark.usefixtures("on_fake")
def test_presets_that_the_engines_do_not_hold_are_not_tried(own_bundle: Path) -> None:
    bundle = add_fake_engines(own_bundle, plans=("gtr-fast",), max_batch=2)
    assert covered_presets(bundle, bundle.engine_sets[0]) == ["gtr-fast"]
    odd = preset("gtr-fast", bundle.architecture, bundle.plan_defaults)
    from dataclasses import replace

    own = resolve(replace(odd, stage_steps=(2, 2, 2), name="own"), bundle.architecture)
    only_odd = add_fake_engines(own_bundle, plans=(own,), max_batch=2)
    with pytest.raises(BackendError, match="hold no preset's shapes"):
        covered_presets(only_odd, only_odd.engine_sets[0])


def test_generate_and_bench_take_the_engines_by_themselves(
    on_fake: FakeMachine, own_bundle: Path, run_cli: Callable[..., Result], tmp_path: Path
) -> None:
    add_fake_engines(own_bundle, plans=("gtr-fast",), max_batch=4)
    done = run_cli(
        "generate", own_bundle, "--classes", "3,7,1", "--batch-size", "2", "--plan", "gtr-fast", "--out", tmp_path / "o"
    )
    assert done.exit_code == 0, done.output
    assert "backend tensorrt: the bundle's engines tensorrt-11.4.0-sm90 run here" in done.stderr
    assert len(list((tmp_path / "o").glob("*.png"))) == 3
    traced = run_cli(
        *("generate", own_bundle, "--classes", "3", "--plan", "gtr-fast", "--out", tmp_path / "t"),
        *("--trace", tmp_path / "t.gif", "--json"),
    )
    assert traced.exit_code == 0, traced.output
    assert json.loads(traced.stdout)["backend"] == "tensorrt"
    assert (tmp_path / "t.gif").is_file()
    launches = on_fake.counts["launches"]
    bench = run_cli("bench", own_bundle, "--plan", "gtr-fast", "--repeat", "2", "--json")
    assert bench.exit_code == 0, bench.output
    # One to try and two that count; of the one that is watched, backbone and head of each of the 16 AR steps.
    assert on_fake.counts["launches"] == launches + 3 + 2 * 16
    shares = json.loads(bench.stdout)["measurements"][0]["shares"]
    assert set(shares) == {"backbone", "head", "decoder", "host"}
    gc.collect()
    assert on_fake.leaks() == []
