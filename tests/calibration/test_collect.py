"""Collecting along the sampler: what is seen, resuming after a kill, the user's own data, bad data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from calibrated import Calibrated
from jobs import ARCHITECTURES

from gtr_deploy.calibration.collect import STAGE_VERSIONS, Collector, collect
from gtr_deploy.calibration.data import calibration_images
from gtr_deploy.calibration.quantize import quantise_graph
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import BackendError, UsageError
from gtr_deploy.runtime.models.class_conditioner import DIGITS, ClassConditioner, imagenet

ARCHITECTURE = ARCHITECTURES["mar-digits"]
CONDITIONER = ClassConditioner(DIGITS)
QUIET = Reporter(quiet=True)


def test_every_layer_is_seen_over_the_whole_trajectory(calibrated: Calibrated) -> None:
    statistics = calibrated.collected.all
    head = [name for name in statistics if name.startswith("head.")]
    assert (len(statistics) - len(head), len(head)) == (35, 7)  # timesteps are looked up
    assert all(seen.values for seen in statistics.values())
    # Both branches, every row, every reverse step.
    rows = sum(
        2 * 10 * (step.predicted * step.diffusion_steps + step.refined * (step.refined_diffusion_steps or 0))
        - 2 * 10 * step.refined * step.diffusion_steps
        for step in calibrated.plan.steps
    )
    assert statistics["adaLN_modulation"].values == rows * ARCHITECTURE.head_width


def test_watching_changes_no_image(calibrated: Calibrated) -> None:
    collector = Collector(calibrated.graphs)
    backend = OnnxRuntimeBackend(collector.graphs, threads=1)
    backend.hook = collector
    from gtr_deploy.calibration.probes import image_errors

    assert image_errors(ARCHITECTURE, backend, calibrated.plan, calibrated.probes).max() < 1e-5


def test_a_killed_run_goes_on_where_it_was(calibrated: Calibrated, tmp_path: Path) -> None:
    checkpoint = tmp_path / "statistics.npz"
    program = f"""
from pathlib import Path
from gtr_deploy.calibration.collect import STAGE_VERSIONS, collect
from gtr_deploy.calibration.data import calibration_images
from gtr_deploy.runtime import Bundle
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.sampling.plan import preset, resolve
bundle = Bundle.load(Path({str(calibrated.graphs["backbone"].parents[1])!r}))
plan = resolve(preset("gtr-fast", bundle.architecture, bundle.plan_defaults), bundle.architecture)
images = calibration_images(bundle.architecture, bundle.conditioner, 1000)
collect(bundle.architecture, bundle.graph_paths(), plan, images, Reporter(), Path({str(checkpoint)!r}), 2, 1)
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    with np.load(checkpoint) as stored:
        done = int(stored["done"])
    assert done >= 2
    graphs, plan = calibrated.graphs, calibrated.plan
    images = calibration_images(ARCHITECTURE, CONDITIONER, 1000)
    # The same run with its end in sight: the record says what it is a record of.
    short = images.part(slice(done + 2))
    assert collect(ARCHITECTURE, graphs, plan, short, QUIET, tmp_path / "other.npz", 2, 1).resumed == 0
    with np.load(tmp_path / "other.npz") as stored:
        identity = stored["identity"]
    with np.load(checkpoint) as stored:
        arrays = {**stored, "identity": identity}
    np.savez(checkpoint, **arrays)
    resumed = collect(ARCHITECTURE, graphs, plan, short, QUIET, checkpoint, 2, 1)
    assert resumed.resumed == done
    fresh = collect(ARCHITECTURE, graphs, plan, short, QUIET, tmp_path / "other.npz", 2, 1)
    assert fresh.resumed == done + 2  # a finished record is simply read
    for name, seen in fresh.all.items():
        np.testing.assert_array_equal(seen.bins, resumed.all[name].bins)
        assert (seen.low, seen.high) == (resumed.all[name].low, resumed.all[name].high)


def test_a_damaged_record_starts_again(calibrated: Calibrated, tmp_path: Path) -> None:
    checkpoint = tmp_path / "statistics.npz"
    checkpoint.write_bytes(b"PK\x03\x04 not really")
    images = calibration_images(ARCHITECTURE, CONDITIONER, 1)
    assert collect(ARCHITECTURE, calibrated.graphs, calibrated.plan, images, QUIET, checkpoint, 1, 1).resumed == 0


def test_statistics_follow_the_versions_of_what_made_them(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resumed() -> int:
        images, record = calibration_images(ARCHITECTURE, CONDITIONER, 1), tmp_path / "statistics.npz"
        return collect(ARCHITECTURE, calibrated.graphs, calibrated.plan, images, QUIET, record, 1, 1).resumed

    assert (resumed(), resumed()) == (0, 1)
    monkeypatch.setitem(STAGE_VERSIONS, "quantise", 99)
    assert resumed() == 1
    monkeypatch.setitem(STAGE_VERSIONS, "noise", 99)
    assert resumed() == 0


def _npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_own_latents_are_what_the_backbone_sees(calibrated: Calibrated, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    latents = rng.uniform(-1, 1, (2, 64, 16)).astype(np.float32)
    path = _npz(tmp_path / "own.npz", latents=latents, labels=np.array([3, 4]))
    images = calibration_images(ARCHITECTURE, CONDITIONER, 64, latents=path)
    assert images.requests == (3, 4)
    collected = collect(ARCHITECTURE, calibrated.graphs, calibrated.plan, images, QUIET, batch_size=2, threads=1)
    assert len(images.seeds) == 2
    own, sampled = collected.all["encoder_blocks.0.attn.qkv"], calibrated.collected.all["encoder_blocks.0.attn.qkv"]
    assert (own.low, own.high) != (sampled.low, sampled.high)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": np.zeros((2, 63, 16), np.float32)}, r"has floats \[n, 64, 16\]"),
        ({"latents": np.zeros((2, 64, 16), np.int64)}, "int64"),
        ({"latents": np.zeros((0, 64, 16), np.float32), "labels": np.zeros(0, np.int64)}, "no images"),
        ({"latents": np.full((2, 64, 16), np.nan, np.float32)}, "image 0 are not finite"),
        ({"labels": np.array([1, 10])}, "class 10 is not in 0..9"),
        ({"labels": np.array([1.0, 2.0])}, "not 2 integers"),
        ({"labels": np.array([1])}, "not 2 integers"),
        ({"labels": np.array([{}, {}], dtype=object)}, "not an NPZ"),
    ],
)
def test_bad_latents_are_one_line(change: dict, message: str, tmp_path: Path) -> None:
    good = {"latents": np.zeros((2, 64, 16), np.float32), "labels": np.array([1, 2])}
    with pytest.raises(UsageError, match=message) as raised:
        calibration_images(ARCHITECTURE, CONDITIONER, 64, latents=_npz(tmp_path / "x.npz", **{**good, **change}))
    assert "\n" not in str(raised.value)


def test_files_that_are_no_latents(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello", encoding="utf-8")
    for name, message in (("text.npz", "not an NPZ"), ("gone.npz", "missing")):
        with pytest.raises(UsageError, match=message):
            calibration_images(ARCHITECTURE, CONDITIONER, 4, latents=tmp_path / name)
    path = _npz(tmp_path / "x.npz", labels=np.array([1]))
    with pytest.raises(UsageError, match="has no latents"):
        calibration_images(ARCHITECTURE, CONDITIONER, 4, latents=path)
    with pytest.raises(UsageError, match="their own classes"):
        calibration_images(ARCHITECTURE, CONDITIONER, 4, [1], latents=path)


@pytest.mark.parametrize(("count", "labels"), [(0, None), (-1, None), (True, None), (4, [10]), (4, [-1]), (4, [])])
def test_bad_images_are_one_line(count: int, labels: list[int] | None) -> None:
    with pytest.raises(UsageError):
        calibration_images(ARCHITECTURE, CONDITIONER, count, labels)


def test_classes_are_spread() -> None:
    assert sorted(set(calibration_images(ARCHITECTURE, CONDITIONER, 64).requests)) == list(range(10))
    assert calibration_images(ARCHITECTURES["mar-b"], ClassConditioner(imagenet()), 4).requests == (0, 250, 500, 750)


def test_quantised_graphs_are_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    target = tmp_path / "backbone.onnx"
    quantise_graph(calibrated.graphs["backbone"], target, calibrated.ranges("cpu"), "cpu")
    images = calibration_images(ARCHITECTURE, CONDITIONER, 1)
    with pytest.raises(UsageError, match="quantised already"):
        collect(ARCHITECTURE, {**calibrated.graphs, "backbone": target}, calibrated.plan, images, QUIET)
    with pytest.raises(UsageError, match="batch size 0"):
        collect(ARCHITECTURE, calibrated.graphs, calibrated.plan, images, QUIET, batch_size=0)


def test_a_value_that_is_not_finite_is_named(calibrated: Calibrated, tmp_path: Path) -> None:
    model = onnx.load(calibrated.graphs["backbone"])
    bias = next(t for t in model.graph.initializer if t.name == "encoder_blocks.1.norm1.bias")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0] = np.nan
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "backbone.onnx")
    graphs = {**calibrated.graphs, "backbone": tmp_path / "backbone.onnx"}
    with pytest.raises(BackendError, match="AR step 1, backbone, tensor"):
        collect(
            ARCHITECTURE, graphs, calibrated.plan, calibration_images(ARCHITECTURE, CONDITIONER, 1), QUIET, threads=1
        )
