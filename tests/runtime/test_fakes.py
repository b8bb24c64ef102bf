"""The fakes of CUDA and TensorRT are strict where it matters, and have only names that the real modules have."""

from __future__ import annotations

import gc
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from fakes import cudart, tensorrt
from fakes.machine import FakeDevice, FakeMachine

from gtr_deploy.runtime.machine.cuda import Cuda, CudaError, PinnedBuffer

PROFILES = [
    {"x": [[1, 3], [2, 3], [4, 3]], "extra": [[0, 3], [1, 3], [4, 3]]},
    {"x": [[4, 3], [8, 3], [8, 3]], "extra": [[0, 3], [1, 3], [4, 3]]},
]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """double [N, 3] = 2 x [N, 3], same [M, 3] = extra [M, 3]; M may be 0."""
    axes = {"x": ["N", 3], "extra": ["M", 3], "double": ["N", 3], "same": ["M", 3]}
    x, extra, double, same = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in axes.items()
    )
    nodes = [
        onnx.helper.make_node("Add", ["x", "x"], ["double"]),
        onnx.helper.make_node("Identity", ["extra"], ["same"]),
    ]
    body = onnx.helper.make_graph(nodes, "double", [x, extra], [double, same])
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path_factory.mktemp("graph") / "double.onnx"
    onnx.save(model, path)
    return path


class Bench:
    """One engine and context, with all that an enqueue needs."""

    def __init__(self, cuda: Cuda, machine: FakeMachine, graph: Path, flavour: str = "tensorrt") -> None:
        self.cuda, self.machine, self.lines = cuda, machine, []
        self.trt: Any = tensorrt.make_module(machine, flavour)
        lines = self.lines

        class Logger(self.trt.ILogger):
            def log(self, severity: Any, msg: str) -> None:
                lines.append(f"{severity.name} {msg}")

        self.runtime = self.trt.Runtime(Logger())
        self.data = tensorrt.fake_engine_bytes(graph, PROFILES, flavour)
        self.engine = self.runtime.deserialize_cuda_engine(self.data)
        self.stream = cuda.create_stream()
        self.host: dict[str, PinnedBuffer] = {}
        self.memory = {name: cuda.allocate(256) for name in ("x", "extra", "double", "same")}

    def context(self, strategy: str = "USER_MANAGED") -> Any:
        return self.engine.create_execution_context(getattr(self.trt.ExecutionContextAllocationStrategy, strategy))

    def ready(self, context: Any, rows: int = 2, extra: int = 0) -> Any:
        assert context.set_input_shape("x", (rows, 3))
        assert context.set_input_shape("extra", [extra, 3])
        assert context.infer_shapes() == []
        assert all(context.set_tensor_address(name, address) for name, address in self.memory.items())
        size = context.update_device_memory_size_for_shapes()
        self.arena = self.cuda.allocate(size)
        context.set_device_memory(self.arena, size)
        return context

    def put(self, value: float) -> None:
        """Queues an upload of x filled with a value."""
        self.host["x"] = self.cuda.allocate_pinned(24)
        self.host["x"].array.view(np.float32)[:] = value
        self.cuda.upload(self.memory["x"], self.host["x"].address, 24, self.stream)

    def get(self) -> list[float]:
        host = self.cuda.allocate_pinned(24)
        self.cuda.download(host.address, self.memory["double"], 24, self.stream)
        self.cuda.synchronize(self.stream)
        return host.array.view(np.float32).tolist()

    def refuses(self, context: Any, words: str) -> None:
        assert context.execute_async_v3(self.stream) is False
        assert words in self.lines[-1]
        assert self.lines[-1].startswith("ERROR")


@pytest.fixture
def bench(cuda: Cuda, machine: FakeMachine, graph: Path) -> Bench:
    return Bench(cuda, machine, graph)


# The fakes' strictness


def test_out_of_bounds_is_sticky(cuda: Cuda, machine: FakeMachine) -> None:
    stream, small, large = cuda.create_stream(), cuda.allocate(256), cuda.allocate(512)
    cuda.copy_rows(large, 257, small, 257, 257, 1, stream)
    for _ in range(2):
        with pytest.raises(CudaError) as caught:
            cuda.synchronize(stream)
        assert caught.value.code == "cudaErrorIllegalAddress"
    assert "257 is not allocated" in machine.faults[0]
    cuda.free(small)
    cuda.free(large)
    cuda.destroy_stream(stream)
    assert machine.leaks() == []


def test_wrong_sides_and_races_are_seen(cuda: Cuda, machine: FakeMachine) -> None:
    one, two, a, b = cuda.create_stream(), cuda.create_stream(), cuda.allocate(8), cuda.allocate(8)
    with pytest.raises(CudaError, match="cudaErrorInvalidValue"):
        cuda.upload(a, b, 8, one)
    cuda.copy_rows(a, 8, b, 8, 8, 1, one)
    cuda.copy_rows(b, 8, a, 8, 8, 1, two)
    assert len(machine.races) == 1
    host = np.zeros(8, np.uint8)
    cuda.download(host.ctypes.data, a, 8, one)  # pageable: CUDA waits, and nobody should be slow by accident
    assert machine.counts["pageable_copies"] == 1
    assert set(host) == {255}


def _public(thing: type | ModuleType) -> list[str]:
    return [name for name in vars(thing) if not name.startswith("_")]


def test_fake_cuda_has_only_real_names() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    fake = cudart.make_module(FakeMachine())
    for name in _public(fake):
        thing = getattr(fake, name)
        assert hasattr(real, name), name
        if isinstance(thing, type) and issubclass(thing, Enum):
            assert {each.name: each.value for each in thing} == {
                each.name: int(getattr(getattr(real, name), each.name)) for each in thing
            }
    assert real.cudaStreamNonBlocking == fake.cudaStreamNonBlocking


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_fake_tensorrt_has_only_real_names(flavour: str) -> None:
    real = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    fake = tensorrt.make_module(FakeMachine(), flavour)
    for name in _public(fake):
        thing = getattr(fake, name)
        assert hasattr(real, name), name
        for base in thing.__mro__ if isinstance(thing, type) and thing is not fake.Dims else ():
            for attribute in _public(base) if base.__module__.startswith("fakes") else ():
                assert hasattr(getattr(real, name), attribute), (name, attribute)
                if issubclass(thing, Enum):
                    assert getattr(thing, attribute).value == getattr(getattr(real, name), attribute).value


# TensorRT


def test_engine_describes_itself(bench: Bench) -> None:
    engine, trt = bench.engine, bench.trt
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    assert names == ["x", "extra", "double", "same"]
    modes = [engine.get_tensor_mode(name) for name in names]
    assert modes == [trt.TensorIOMode.INPUT] * 2 + [trt.TensorIOMode.OUTPUT] * 2
    assert trt.nptype(engine.get_tensor_dtype("x")) == np.float32
    assert engine.get_tensor_shape("double") == (-1, 3)
    assert (engine.num_optimization_profiles, engine.get_tensor_profile_shape("x", 1)[2]) == (2, (8, 3))
    sizes = [engine.get_device_memory_size_for_profile_v2(index) for index in (0, 1)]
    assert 0 < sizes[0] < sizes[1]


@pytest.mark.parametrize(
    "damage",
    [
        {"version": "11.3.0"},
        {"flavour": "tensorrt-rtx"},
        {"compute_capability": "8.9"},
    ],
)
def test_foreign_engines_are_none_and_the_reason_is_logged(bench: Bench, graph: Path, damage: dict[str, str]) -> None:
    for data in (tensorrt.fake_engine_bytes(graph, PROFILES, **damage), bench.data[:-9], b"", b"\xff\0"):
        bench.lines.clear()
        assert bench.runtime.deserialize_cuda_engine(data) is None
        assert bench.lines[0].startswith("ERROR")


def test_enqueue_runs_the_graph_when_somebody_waits(bench: Bench) -> None:
    context = bench.ready(bench.context())
    bench.put(3)
    assert context.execute_async_v3(bench.stream)
    assert bench.get() == [6.0] * 6
    assert context.get_tensor_shape("double") == (2, 3)
    assert context.get_tensor_shape("same") == (0, 3)
    arena = bench.machine.live[bench.arena]
    assert len(set(arena.storage.tolist())) > 100  # nothing survives there
    assert context.execute_async_v3(0)
    assert bench.lines == ["WARNING Using default stream in enqueueV3() may lead to performance issues"]
    bench.machine.fail_enqueue_after = 3
    bench.refuses(context, "injected")


def test_shapes_are_held_to_the_profile(bench: Bench) -> None:
    context = bench.context()
    assert context.infer_shapes() == ["x", "extra"]
    assert context.get_tensor_shape("double") == (-1, 3)
    assert not context.set_input_shape("x", (8, 3))
    assert "outside" in bench.lines[-1]
    assert context.set_input_shape("x", (4, 3))
    assert context.set_optimization_profile_async(1, bench.stream)
    assert context.infer_shapes() == ["x", "extra"]
    assert context.set_input_shape("x", (8, 3))
    assert not context.set_optimization_profile_async(2, bench.stream)
    assert not context.set_input_shape("double", (8, 3))
    assert context.update_device_memory_size_for_shapes() == 0


def test_enqueue_refuses_what_is_not_ready(bench: Bench) -> None:
    context = bench.context()
    bench.refuses(context, "no shape for x, extra")
    context.set_input_shape("x", (2, 3))
    context.set_input_shape("extra", (0, 3))
    bench.refuses(context, "no address for x")
    bench.ready(context)
    context.set_tensor_address("same", 0)
    bench.refuses(context, "no address for same")  # empty, and still wants one
    context.set_tensor_address("same", bench.memory["x"])
    context.set_tensor_address("double", bench.memory["x"])
    bench.refuses(context, "overlaps")
    assert not context.set_tensor_address("double", bench.memory["double"] + 4)
    bench.ready(context)
    context.set_device_memory(bench.arena, 256)
    bench.refuses(context, "device memory")
    bench.ready(context)
    bench.cuda.free(bench.arena)
    bench.refuses(context, "device memory")
    bench.ready(context)
    assert context.execute_async_v3(bench.stream)
    context.set_input_shape("x", (1, 3))  # smaller, but the size asked for before no longer counts
    bench.refuses(context, "device memory")
    assert context.update_device_memory_size_for_shapes()
    assert context.execute_async_v3(bench.stream)


def test_tensors_outside_their_memory_are_seen(bench: Bench) -> None:
    context = bench.ready(bench.context())
    bench.cuda.free(bench.memory["double"])
    assert context.execute_async_v3(bench.stream)
    with pytest.raises(CudaError, match="cudaErrorIllegalAddress"):
        bench.cuda.synchronize(bench.stream)
    assert bench.machine.faults[0].startswith("enqueueV3: device")


def test_capture_needs_one_eager_run(bench: Bench) -> None:
    context, cuda = bench.ready(bench.context()), bench.cuda
    for rows in (2, 1):
        bench.ready(context, rows)
        cuda.begin_capture(bench.stream)
        bench.refuses(context, "capturing")
        with pytest.raises(CudaError, match="Invalidated"):
            cuda.end_capture(bench.stream)
        assert context.execute_async_v3(bench.stream)
    bench.ready(context)
    assert context.execute_async_v3(bench.stream)
    cuda.begin_capture(bench.stream)
    assert context.execute_async_v3(bench.stream)
    graph, _ = cuda.end_capture(bench.stream)
    context.set_input_shape("x", (1, 3))  # allowed: its memory is the user's
    bench.put(5)
    cuda.launch(graph, bench.stream)
    assert bench.get() == [10.0] * 6
    del context
    gc.collect()
    cuda.launch(graph, bench.stream)
    with pytest.raises(CudaError, match="cudaErrorIllegalAddress"):
        bench.get()
    assert "context is gone" in bench.machine.faults[0]


def test_a_context_with_its_own_memory_gives_it_back(bench: Bench) -> None:
    before = len(bench.machine.live)
    context = bench.context("STATIC")
    assert len(bench.machine.live) == before + 1
    del context
    gc.collect()
    assert len(bench.machine.live) == before
    bench.machine.devices = [FakeDevice(memory=2048)]
    assert bench.context("STATIC") is None
    assert "out of memory" in bench.lines[-1]


def test_rtx_has_runtime_configurations(cuda: Cuda, machine: FakeMachine, graph: Path) -> None:
    bench = Bench(cuda, machine, graph, "tensorrt-rtx")
    settings = bench.engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(bench.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    settings.cuda_graph_strategy = bench.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    context = bench.ready(bench.engine.create_execution_context(settings))
    assert not context.is_stream_capturable(bench.stream)
    bench.put(1)
    assert context.execute_async_v3(bench.stream)
    assert context.is_stream_capturable(bench.stream)
    assert bench.get() == [2.0] * 6
    assert "cuda_graph_strategy WHOLE_GRAPH_CAPTURE" in machine.log


def test_loggers_must_be_initialised(machine: FakeMachine) -> None:
    trt: Any = tensorrt.make_module(machine)

    class Forgetful(trt.ILogger):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called"):
        trt.Runtime(Forgetful())
