"""The TensorRT runner over a fake CUDA and TensorRT that execute the ONNX graphs: generations, call order, errors.

The fake checks every address, alignment and synchronisation, and destroys what lies in the activations; the same tests
for a real GPU are in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes.bundles import add_fake_engines, fake_host, pipeline_of
from fakes.machine import Error, FakeMachine

from gtr_deploy.runtime.backends.tensorrt.backend import KEPT_PROGRAMS, TensorRTBackend, open_tensorrt
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.timing import measure
from gtr_deploy.runtime.errors import BackendError, BundleError
from gtr_deploy.runtime.files import cache_dir
from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.sampling.plan import SamplingPlan, preset, resolve


@pytest.fixture
def machine(fake_gpu: FakeMachine) -> FakeMachine:
    return fake_gpu


def plan_of(like: Pipeline, name: str = "gtr", **changes) -> SamplingPlan:
    architecture = like.architecture
    return resolve(replace(preset(name, architecture, like.plan_defaults), **changes), architecture)


def test_a_replayed_generation_is_one_upload_one_launch_one_download(
    machine: FakeMachine, opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline
) -> None:
    backend = opened()
    plan = digits_pipeline.plan("gtr-fast")
    backend.warm_up(plan, 2)
    ours = pipeline_of(backend, digits_pipeline)
    machine.log.clear()
    enqueues = machine.counts["enqueues"]
    backend_latents = ours.generate([3, 7], plan=plan).latents
    decoder = 1
    assert machine.counts["enqueues"] - enqueues == decoder
    calls = machine.calls()
    assert calls.count("cudaGraphLaunch") == 1
    before_decoding = calls[: calls.index("cudaGraphLaunch") + 3]
    assert before_decoding.count("cudaMemcpyAsync") == 2, calls
    assert not any(call.startswith("set_input_shape") for call in calls[: len(before_decoding)])
    np.testing.assert_allclose(backend_latents, digits_pipeline.generate([3, 7], plan=plan).latents, atol=1e-5)


def test_parts_are_timed(opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline) -> None:
    measured = measure(pipeline_of(opened(), digits_pipeline), digits_pipeline.plan("gtr-fast"), 1, 2)
    assert measured.shares["head"] > 0
    assert measured.shares["backbone"] > 0
    assert sum(measured.shares.values()) == pytest.approx(1.0)


def test_shapes_are_set_once_per_context(
    machine: FakeMachine, opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline
) -> None:
    ours = pipeline_of(opened(cuda_graph="off"), digits_pipeline)
    ours.generate([1], plan="gtr-fast")
    made = machine.calls().count("create_execution_context")
    shapes = machine.calls().count("set_input_shape")
    ours.generate([2], plan="gtr-fast")
    assert machine.calls().count("create_execution_context") == made
    assert machine.calls().count("set_input_shape") == shapes


def test_a_larger_batch_moves_the_arena_and_captures_anew(
    machine: FakeMachine, opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline
) -> None:
    ours = pipeline_of(opened(), digits_pipeline)
    small = digits_pipeline.generate([3], plan="gtr-fast").latents
    large = digits_pipeline.generate([1, 2, 3, 4], plan="gtr-fast").latents
    for _ in range(2):
        np.testing.assert_allclose(ours.generate([3], plan="gtr-fast").latents, small, atol=1e-5)
    for _ in range(2):
        np.testing.assert_allclose(ours.generate([1, 2, 3, 4], plan="gtr-fast").latents, large, atol=1e-5)
    for _ in range(3):
        np.testing.assert_allclose(ours.generate([3], plan="gtr-fast").latents, small, atol=1e-5)
    assert machine.counts["captures"] == 3


def test_old_programs_make_room(
    machine: FakeMachine, opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline
) -> None:
    plans = [plan_of(digits_pipeline, "gtr-fast", temperature=0.5 + 0.1 * n) for n in range(KEPT_PROGRAMS + 2)]
    ours = pipeline_of(opened(), digits_pipeline)
    live = []
    for plan in plans:
        ours.generate([3], plan=plan)
        live.append(len(machine.live))
    assert live[KEPT_PROGRAMS - 1] == live[-1]
    wanted = digits_pipeline.generate([3], plan=plans[0]).latents
    np.testing.assert_allclose(ours.generate([3], plan=plans[0]).latents, wanted, atol=1e-5)


def test_an_enqueue_that_fails_is_one_line_with_the_library_s_words(
    machine: FakeMachine, opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline
) -> None:
    backend = opened()
    machine.fail_enqueue_after = 40
    ours = pipeline_of(backend, digits_pipeline)
    with pytest.raises(BackendError, match=r"engine failed: .*injected failure"):
        ours.generate([3], plan="gtr-fast")
    found = ours.generate([3], plan="gtr-fast").latents  # and it still works afterwards
    np.testing.assert_allclose(found, digits_pipeline.generate([3], plan="gtr-fast").latents, atol=1e-5)


def test_an_enqueue_that_fails_while_capturing_falls_back(
    machine: FakeMachine, opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline
) -> None:
    ours = pipeline_of(opened(), digits_pipeline)
    ours.generate([3], plan="gtr-fast")
    machine.fail_enqueue_after = machine.counts["enqueues"] + 5
    with pytest.warns(RuntimeWarning, match="injected failure"):
        found = ours.generate([3], plan="gtr-fast").latents
    np.testing.assert_allclose(found, digits_pipeline.generate([3], plan="gtr-fast").latents, atol=1e-5)


def test_out_of_memory_names_the_bytes_and_leaves_nothing(
    machine: FakeMachine, opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline
) -> None:
    backend = opened()
    machine.context_bytes = 0
    machine.devices[0].memory = 300_000
    with pytest.raises(BackendError, match=r"allocating \d+ bytes of GPU memory .* out of memory"):
        pipeline_of(backend, digits_pipeline).generate([1, 2, 3, 4], plan="gtr")
    machine.devices[0].memory = 1 << 30
    wanted = digits_pipeline.generate([1], plan="gtr-fast").latents
    np.testing.assert_allclose(
        pipeline_of(backend, digits_pipeline).generate([1], plan="gtr-fast").latents, wanted, atol=1e-5
    )


def test_a_shape_that_no_profile_holds_names_it_and_the_command(
    opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline
) -> None:
    ours = pipeline_of(opened(plans=("gtr-fast",), max_batch=2), digits_pipeline)
    with pytest.raises(BackendError, match=r"no profile for .*B=3.*gtr-export engine .* --engine tensorrt --plans"):
        ours.generate([1, 2, 3], plan="gtr-fast")


def test_values_that_are_not_finite_name_the_ar_step(
    opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline
) -> None:
    ours = pipeline_of(opened(), digits_pipeline)

    class Broken:
        def draw(self, images, positions, steps):
            noise = np.zeros((len(images), steps + 1, 16), dtype=np.float32)
            noise[positions == 27] = np.nan
            return noise

    for _ in range(2):
        with pytest.raises(BackendError, match=r"AR step \d+ of \d+ gave values that are not finite"):
            ours.generate([1], plan="gtr-fast", noise=Broken())
    assert np.isfinite(ours.generate([1], plan="gtr-fast").latents).all()


def test_damaged_engines_are_refused_with_the_library_s_words(machine: FakeMachine, own_bundle: Path) -> None:
    bundle = add_fake_engines(own_bundle)
    path = bundle.engine_paths(bundle.engine_sets[0])["backbone"]
    path.write_bytes(path.read_bytes().replace(b"9.0", b"8.9"))
    with pytest.raises(BundleError, match="sha256"):
        open_tensorrt(bundle, "tensorrt", machine=fake_host(machine))
    with pytest.raises(BackendError, match=r"refuses .*backbone.engine: .*8\.9.*rebuild with gtr-export engine"):
        open_tensorrt(bundle, "tensorrt", checksums=False, machine=fake_host(machine))
    assert machine.leaks() == []


def test_wrong_device(machine: FakeMachine, own_bundle: Path) -> None:
    bundle = add_fake_engines(own_bundle)
    with pytest.raises(BackendError, match="this machine has 1 GPU"):
        open_tensorrt(bundle, "tensorrt", device=3, machine=fake_host(machine))


def test_one_graph_call_with_plain_arrays(opened: Callable[..., TensorRTBackend], digits_pipeline: Pipeline) -> None:
    backend = opened()
    z = np.random.default_rng(0).standard_normal((2, 16, 128)).astype(np.float32)
    for mine, theirs in zip(
        backend.run("detail_score", {"z": z}), digits_pipeline.backend.run("detail_score", {"z": z}), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    with pytest.raises(BackendError, match="no vae engine"):
        backend.run("vae", {})


def test_teardown_frees_everything_even_on_a_broken_gpu(machine: FakeMachine, own_bundle: Path) -> None:
    bundle = add_fake_engines(own_bundle)
    with closing(open_tensorrt(bundle, "tensorrt", machine=fake_host(machine))) as backend:
        backend.warm_up(resolve(preset("gtr-fast", bundle.architecture, bundle.plan_defaults), bundle.architecture), 1)
    assert machine.leaks() == []
    backend.close()  # twice does no harm
    failing = open_tensorrt(bundle, "tensorrt", machine=fake_host(machine))
    failing.decode(np.zeros((1, 64, 16), dtype=np.float32))
    machine.fail_next["cudaStreamSynchronize"] = Error.cudaErrorIllegalAddress
    with pytest.raises(BackendError, match="illegal memory access"):
        failing.close()
    assert machine.leaks() == []


def test_half_built_backends_leave_nothing(machine: FakeMachine, own_bundle: Path) -> None:
    bundle = add_fake_engines(own_bundle)
    machine.fail_next["cudaStreamCreateWithFlags"] = Error.cudaErrorMemoryAllocation
    with pytest.raises(BackendError, match="creating a CUDA stream"):
        open_tensorrt(bundle, "tensorrt", machine=fake_host(machine))
    assert machine.leaks() == []
    other = replace(fake_host(machine), gpu=None, gpu_problem="no driver")
    with pytest.raises(BackendError, match="TensorRT engines need a GPU: no driver"):
        open_tensorrt(bundle, "tensorrt", machine=other)


def test_rtx_kernels_are_compiled_once_and_kept(
    opened: Callable[..., TensorRTBackend],
    digits_pipeline: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GTR_DEPLOY_CACHE", str(tmp_path / "cache"))
    folder = cache_dir() / "kernels"
    for runs in range(1, 3):
        backend = opened("tensorrt-rtx", plans=("gtr-fast",))
        pipeline_of(backend, digits_pipeline).generate([3], plan="gtr-fast")
        backend.close()
        stored = sorted(int(file.read_text().split()[1]) for file in folder.glob("*.cache"))
        assert len(stored) == 8
        # One cache per engine, shared by its contexts, of which the modulation has the most.
        assert stored[-1] == runs * 17
    for file in folder.glob("*.cache"):
        file.write_bytes(b"damaged")
    pipeline_of(opened("tensorrt-rtx"), digits_pipeline).generate([3], plan="gtr-fast")


def test_bundle_lists_engines_strictly(own_bundle: Path) -> None:
    bundle = add_fake_engines(own_bundle)
    assert Bundle.load(own_bundle).engine_sets == bundle.engine_sets
    assert bundle.engine_sets[0].key == "tensorrt-11.4.0-sm90"
    assert add_fake_engines(own_bundle).engine_sets == bundle.engine_sets  # replaced, not doubled
