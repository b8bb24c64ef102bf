"""What a first run on a GPU would meet (docs/gpu.md has the list), on the stand-in: memory, captures, errors."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event, current_thread
from threading import enumerate as enumerate_threads
from typing import Any

import numpy as np
import pytest
from fakes.bundles import add_fake_engines, fake_host, pipeline_of
from fakes.machine import Error, FakeDevice, FakeMachine

from gtr_deploy.runtime.backends.tensorrt import device_program
from gtr_deploy.runtime.backends.tensorrt.backend import KEPT_CALLS, KEPT_PROGRAMS, TensorRTBackend, open_tensorrt
from gtr_deploy.runtime.commands.timing import part_shares
from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.files import cache_dir
from gtr_deploy.runtime.machine.cuda import Cuda
from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.sampling.chains import Floats
from gtr_deploy.runtime.sampling.noise import SeededNoise
from gtr_deploy.runtime.sampling.shapes import call_shapes

Opener = Callable[..., TensorRTBackend]
FAST = "gtr-fast"


@pytest.fixture
def machine(fake_gpu: FakeMachine) -> FakeMachine:
    return fake_gpu


@pytest.fixture(scope="module")
def wanted(digits_pipeline: Pipeline) -> Floats:
    """Latents of ``generate([3], plan=FAST)``."""
    return digits_pipeline.generate([3], plan=FAST).latents


def _equal(pipeline: Pipeline, wanted: Floats) -> None:
    np.testing.assert_allclose(pipeline.generate([3], plan=FAST).latents, wanted, atol=1e-5)


@contextmanager
def _counted(machine: FakeMachine, **counts: int) -> Iterator[None]:
    """Exactly so many of each happen."""
    before = {name: machine.counts[name] for name in counts}
    yield
    assert {name: machine.counts[name] - before[name] for name in counts} == counts


@pytest.mark.parametrize("cuda_graph", ["generation", "step"])
def test_after_a_warm_up_generations_are_replayed_at_once(
    machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline, wanted: Floats, cuda_graph: str
) -> None:
    """Although the decoder, which nobody has called yet, needs the most activations; and graphs lie on the GPU."""
    backend = opened(cuda_graph=cuda_graph)
    ours = pipeline_of(backend, digits_pipeline)
    ours.warm_up(FAST, 1)
    launches = len(digits_pipeline.plan(FAST).steps) if cuda_graph == "step" else 1
    for _ in range(2):
        with _counted(machine, launches=launches, cold_launches=0, captures=0, enqueues=1):  # the decoder's
            _equal(ours, wanted)
    calls = backend._contexts.engines
    assert calls["decoder"].calls[0].memory > max(c.memory for c in calls["backbone"].calls)


def test_a_decoded_batch_allocates_nothing_and_copies_from_page_locked_memory(
    machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline
) -> None:
    backend = opened()
    latents = np.random.default_rng(0).standard_normal((KEPT_CALLS + 2, 64, 16)).astype(np.float32)
    for size in (*range(1, 5), 1, 2, 4):
        machine.log.clear()
        images = backend.decode(latents[:size])
        assert np.abs(images.astype(int) - digits_pipeline.backend.decode(latents[:size])).max() <= 1
        if size < 3 and "cudaMalloc" in machine.calls():
            first = [size] if size > 1 else []
    assert not first or first == [2], "calls of the last batch sizes are kept"
    assert "cudaMalloc" not in machine.calls()
    assert machine.counts["pageable_copies"] == 0
    with pytest.raises(BackendError, match=r"latents has the shape \[1, 64, 1\], not \[1, 64, 16\]"):
        backend.run("decoder", {"latents": np.zeros((1, 64, 1), np.float32)})


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_whatever_ends_a_capture_the_backend_works_on(
    machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline, wanted: Floats, error: type[BaseException]
) -> None:
    ours = pipeline_of(opened(), digits_pipeline)
    ours.generate([3], plan=FAST)

    def interrupt() -> None:
        if any(machine.capturing(number) for number, each in machine.handles.items() if hasattr(each, "recording")):
            machine.on_enqueue = lambda: None
            raise error

    machine.on_enqueue = interrupt
    with pytest.raises(error):
        ours.generate([3], plan=FAST)
    with _counted(machine, captures=1, launches=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            _equal(ours, wanted)


def test_no_destructor_runs_inside_a_capture(
    machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline, wanted: Floats
) -> None:
    backend = opened()
    ours = pipeline_of(backend, digits_pipeline)
    ours.generate([3], plan=FAST)

    class Freed:
        def __init__(self) -> None:
            self.me, self.address = self, machine.allocate("device", 256)

        def __del__(self) -> None:
            backend._cuda.free(self.address)

    machine.on_enqueue = lambda: Freed().__class__ and None
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _equal(ours, wanted)
    finally:
        gc.set_threshold(*thresholds)
        machine.on_enqueue = lambda: None
    assert gc.isenabled()
    assert machine.counts["captures"] == 1
    gc.collect()


def test_contexts_go_with_the_last_program_that_needs_them(
    machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline
) -> None:
    plans = [digits_pipeline.plan(f"gtr-fast:stage_steps={n}+2+1") for n in range(4, 4 + KEPT_PROGRAMS + 3)]
    ours = pipeline_of(opened(plans=plans), digits_pipeline)
    for index, plan in enumerate((*plans, *plans)):
        ours.generate([3], plan=plan)
        kept = (plans * 2)[max(0, index + 1 - KEPT_PROGRAMS) : index + 1]
        shapes = {
            (kind, *sorted(sizes.items()))
            for each in kept
            for kind, calls in call_shapes(each, 1).items()
            for sizes in calls
        }
        assert len(machine.contexts) == len(shapes)


def test_a_generation_that_cannot_be_captured_is_captured_step_by_step(
    machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline, wanted: Floats
) -> None:
    ours = pipeline_of(opened(), digits_pipeline)
    machine.fail_next["cudaGraphInstantiate"] = Error.cudaErrorMemoryAllocation
    with pytest.warns(RuntimeWarning, match=r"out of memory\); from now on AR steps are captured one by one") as caught:
        ours.warm_up(FAST, 1)
    assert len(caught) == 1
    with _counted(machine, launches=len(digits_pipeline.plan(FAST).steps), captures=0, enqueues=1):
        _equal(ours, wanted)
    with _counted(machine, launches=1, captures=0), warnings.catch_warnings():  # another program is none the worse
        warnings.simplefilter("error")
        ours.warm_up(FAST, 2)
        machine.counts["captures"] -= 1
        ours.generate([3, 4], plan=FAST)


def test_graphs_of_a_program_have_a_limit(
    machine: FakeMachine,
    opened: Opener,
    digits_pipeline: Pipeline,
    wanted: Floats,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What fits is replayed, the rest runs eagerly."""
    monkeypatch.setattr(device_program, "MOST_NODES", 300)
    ours = pipeline_of(opened(), digits_pipeline)
    with pytest.warns(RuntimeWarning, match="CUDA graph capture failed") as caught:
        ours.warm_up(FAST, 1)
    assert [str(each.message).split("from now on ")[1] for each in caught] == [
        "AR steps are captured one by one",
        "no more CUDA graphs, which is slower",
    ]
    graphs = [each for each in machine.handles.values() if type(each).__name__ == "GraphExec"]
    steps = len(digits_pipeline.plan(FAST).steps)
    assert 0 < len(graphs) < steps
    assert sum(len(each.works) for each in graphs) <= 300
    with _counted(machine, launches=len(graphs), captures=0), warnings.catch_warnings():
        warnings.simplefilter("error")
        _equal(ours, wanted)


def test_captures_that_never_work_are_told_once_per_program(
    machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline, wanted: Floats
) -> None:
    machine.fail_capture = True
    ours = pipeline_of(opened(), digits_pipeline)
    with pytest.warns(RuntimeWarning, match="CUDA graph capture failed") as caught:
        ours.warm_up(FAST, 1)
    assert len(caught) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            _equal(ours, wanted)


def test_a_full_gpu_makes_room_by_dropping_other_plans(
    machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline
) -> None:
    ours = pipeline_of(opened(), digits_pipeline)
    ours.warm_up(FAST, 1)
    used = machine.devices[0].memory - machine.free_bytes()
    large = digits_pipeline.generate([1, 2, 3, 4], plan=FAST).latents
    machine.devices[0].memory = used + 4_000_000
    np.testing.assert_allclose(ours.generate([1, 2, 3, 4], plan=FAST).latents, large, atol=1e-5)


def test_sizes_that_the_library_cannot_tell_are_the_profile_s(
    machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline, wanted: Floats
) -> None:
    machine.fail_sizes = True
    _equal(pipeline_of(opened(), digits_pipeline), wanted)


def test_rtx_engines_without_their_flag_run_eagerly_with_a_word(
    machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline, wanted: Floats
) -> None:
    ours = pipeline_of(opened("tensorrt-rtx", user_allocation=False), digits_pipeline)
    with pytest.warns(RuntimeWarning, match="the library says that it cannot capture"):
        ours.warm_up(FAST, 1)
    assert machine.counts["captures"] == 0
    _equal(ours, wanted)


def test_rtx_keeps_its_kernels_after_a_warm_up(
    opened: Opener, digits_pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server is killed, not closed."""
    monkeypatch.setenv("GTR_DEPLOY_CACHE", str(tmp_path))
    ours = pipeline_of(opened("tensorrt-rtx"), digits_pipeline)
    ours.warm_up(FAST, 1)
    assert len(list((cache_dir() / "kernels").glob("*.cache"))) == 8
    ours.warm_up(FAST, 2)  # and still attaches it to new contexts
    assert max(int(file.read_text().split()[1]) for file in (cache_dir() / "kernels").glob("*.cache")) > 20


def test_two_backends_share_the_library_s_one_logger(machine: FakeMachine, own_bundle: Path) -> None:
    bundle = add_fake_engines(own_bundle)
    with closing(open_tensorrt(bundle, "tensorrt", machine=fake_host(machine))):
        path = bundle.engine_paths(bundle.engine_sets[0])["backbone"]
        path.write_bytes(path.read_bytes().replace(b'"9.0"', b'"8.9"'))
        with pytest.raises(BackendError, match=r"built for compute capability 8\.9"):
            open_tensorrt(bundle, "tensorrt", checksums=False, machine=fake_host(machine))


def test_the_chosen_gpu_decides_which_engines_run(machine: FakeMachine, own_bundle: Path) -> None:
    bundle = add_fake_engines(own_bundle)
    machine.devices = [FakeDevice("NVIDIA L4", "8.9"), FakeDevice()]
    with pytest.raises(BackendError, match=r"compute capability 9\.0.*NVIDIA L4"):
        open_tensorrt(bundle, "tensorrt", device=0)
    with closing(open_tensorrt(bundle, "tensorrt", device=1)) as backend:
        assert "Fake H100" in backend.description
    with pytest.raises(BackendError, match="this machine has 2 GPUs, numbers 0 to 1"):
        open_tensorrt(bundle, "tensorrt", device=2)


def test_the_next_batch_s_noise_is_drawn_while_the_gpu_works(
    opened: Opener, digits_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never on the thread that feeds the GPU; pictures are what they were."""
    ours = pipeline_of(opened(), digits_pipeline)
    ours.warm_up(FAST, 2)
    threads: Counter[str] = Counter()
    two_drawn, draw, launch = Event(), SeededNoise.draw, Cuda.launch
    steps = len(digits_pipeline.plan(FAST).steps)

    def drawn(self: SeededNoise, *asked: Any) -> Any:
        result = draw(self, *asked)
        threads[current_thread().name.split("_")[0]] += 1
        if threads["noise"] == 2 * steps:
            two_drawn.set()
        return result

    def launched(self: Cuda, *graph: int) -> None:
        assert two_drawn.wait(60), "the first batch runs, and nobody draws for the second"
        launch(self, *graph)

    monkeypatch.setattr(SeededNoise, "draw", drawn)
    monkeypatch.setattr(Cuda, "launch", launched)
    requests, seeds = [3, 7, 1, 0, 5], [5, 2**63, 0, 8, 9]
    found = ours.generate(requests, seeds, FAST, batch_size=2).latents
    streamed = [each.latents for each in ours.stream(requests, seeds, FAST, batch_size=2)]
    assert threads == {"noise": 6 * steps}
    monkeypatch.undo()
    np.testing.assert_array_equal(found, np.concatenate(streamed))
    np.testing.assert_array_equal(found[:2], ours.generate(requests[:2], seeds[:2], FAST).latents)
    wanted = digits_pipeline.generate(requests, seeds, FAST).latents
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    lazy = next(ours.stream(iter(requests), iter(seeds), FAST, batch_size=2))
    np.testing.assert_array_equal(lazy.latents, found[:2])


def test_a_stream_that_nobody_reads_on_leaves_no_thread(opened: Opener, digits_pipeline: Pipeline) -> None:
    pictures = pipeline_of(opened(), digits_pipeline).stream([3] * 6, None, FAST, batch_size=1)
    next(pictures)
    pictures.close()
    del pictures
    gc.collect()
    for thread in enumerate_threads():
        if thread.name.startswith("noise"):
            thread.join(60)
            assert not thread.is_alive()


def test_parts_are_timed_in_replays(machine: FakeMachine, opened: Opener, digits_pipeline: Pipeline) -> None:
    """Not in an eager run, which waits for the host; and nothing of it stays."""
    backend = opened()
    ours = pipeline_of(backend, digits_pipeline)
    ours.warm_up(FAST, 1)
    before, graphs = len(machine.handles), 2 * len(digits_pipeline.plan(FAST).steps)
    with _counted(machine, launches=graphs, captures=graphs):
        shares = part_shares(ours, lambda: float(bool(ours.generate([3], plan=FAST))))
    assert shares["head"] > 0
    assert shares["backbone"] > 0
    assert len(machine.handles) == before
