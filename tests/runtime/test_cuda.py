"""runtime/cuda.py over the fake CUDA, and once on a real GPU; test_fakes.py tests the fake itself."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes.machine import FakeDevice, FakeMachine
from numpy.typing import NDArray

from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.machine.cuda import Cuda, CudaError, PinnedBuffer, list_devices


def pinned(cuda: Cuda, values: NDArray[Any] | bytes) -> PinnedBuffer:
    data = np.frombuffer(bytes(values), np.uint8)
    buffer = cuda.allocate_pinned(data.size)
    buffer.array[:] = data
    return buffer


# Devices


def test_devices_are_listed(machine: FakeMachine) -> None:
    machine.devices.append(FakeDevice("Small", "8.6", 1 << 20))
    first, second = list_devices()
    assert (first.name, first.compute_capability, first.driver) == ("Fake H100", "9.0", "13.0")
    assert (second.name, second.memory) == ("Small", 1 << 20)
    cuda = Cuda(1)
    assert cuda.device == second
    assert cuda.memory() == (1 << 20, 1 << 20)
    assert "cudaSetDevice 1" in machine.log


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (list_devices, Cuda):
        with pytest.raises(BackendError, match=r"cuda-bindings is not installed; pip install 'gtr-deploy\[tensorrt\]'"):
            call()


def broken_loader(*_: Any) -> Any:
    raise RuntimeError('Function "cuInit" not found')


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"driver_version": 0}, "cudaErrorInsufficientDriver", "no NVIDIA driver is installed"),
        (
            {"driver_version": 12040},
            "cudaErrorInsufficientDriver",
            r"supports CUDA 12.4, cuda-bindings needs CUDA 13.0; update the driver, or .*'gtr-deploy\[tensorrt-cu12\]'",
        ),
        ({"devices": []}, "cudaErrorNoDevice", "driver 13.0 sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ({"fail_next": {"cudaGetDeviceCount": "cudaErrorInvalidValue"}}, "cudaErrorInvalidValue", "invalid argument"),
    ],
)
def test_no_usable_gpu(machine: FakeMachine, change: dict[str, Any], code: str, words: str) -> None:
    for name, value in change.items():
        setattr(machine, name, value)
    with pytest.raises(CudaError, match=words) as caught:
        list_devices()
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


def test_no_driver_with_older_bindings(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["cuda.bindings.runtime"], "cudaDriverGetVersion", broken_loader)
    with pytest.raises(CudaError, match="no NVIDIA driver"):
        list_devices()


def test_real_bindings_without_driver() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    try:
        found = [f"GPU of compute capability {each.compute_capability}" for each in list_devices()]
    except CudaError as error:
        found = [str(error)]
    assert found[0].startswith(("GPU of", "looking for a GPU: cudaError"))


@pytest.mark.parametrize(("count", "found"), [(1, "1 GPU, number 0"), (2, "2 GPUs, numbers 0 to 1")])
@pytest.mark.parametrize("index", [-1, 2])
def test_wrong_device(machine: FakeMachine, index: int, count: int, found: str) -> None:
    machine.devices = [FakeDevice()] * count
    with pytest.raises(CudaError, match=f"selecting GPU {index}: cudaErrorInvalidDevice: this machine has {found}"):
        Cuda(index)


# Memory and copies


def test_a_round_trip(cuda: Cuda, machine: FakeMachine) -> None:
    stream, other = cuda.create_stream(), cuda.allocate(16)
    source, target = pinned(cuda, bytes(range(16))), cuda.allocate_pinned(16)
    address = cuda.allocate(16)
    cuda.upload(address, source.address, 16, stream)
    cuda.copy_rows(other, 16, address, 16, 16, 1, stream)
    cuda.download(target.address, other, 16, stream)
    assert set(target.array) == {255}  # nothing has run yet
    source.array[0] = 77  # a pinned source is read when the copy runs
    cuda.synchronize(stream)
    assert target.array.tolist() == [77, *range(1, 16)]
    assert [machine.counts[name] for name in ("uploaded", "copied", "downloaded")] == [16, 16, 16]
    assert len(machine.leaks()) == 5
    cuda.free_pinned(source)
    cuda.free_pinned(target)
    cuda.free(address)
    cuda.free(other)
    cuda.destroy_stream(stream)
    assert machine.leaks() == []
    assert machine.faults == machine.races == []


def test_pitched_copy(cuda: Cuda) -> None:
    stream, source, target = cuda.create_stream(), cuda.allocate(256), cuda.allocate(256)
    upload, download = pinned(cuda, bytes(range(24))), cuda.allocate_pinned(24)
    cuda.upload(source, upload.address, 24, stream)
    cuda.copy_rows(target, 4, source + 2, 8, 3, 3, stream)
    cuda.copy_rows(target + 12, 4, source, 8, 0, 3, stream)
    cuda.copy_rows(target + 12, 4, source, 8, 3, 0, stream)
    cuda.download(download.address, target, 12, stream)
    cuda.synchronize(stream)
    assert download.array[:12].tolist() == [2, 3, 4, 255, 10, 11, 12, 255, 18, 19, 20, 255]
    with pytest.raises(CudaError, match="copying 2 rows of 9 bytes within the GPU: cudaErrorInvalidPitchValue"):
        cuda.copy_rows(target, 8, source, 9, 9, 2, stream)


def test_nothing_still_has_an_address(cuda: Cuda, machine: FakeMachine) -> None:
    stream = cuda.create_stream()
    first, second, host = cuda.allocate(0), cuda.allocate(0), cuda.allocate_pinned(0)
    assert first
    assert second not in (0, first)
    assert host.array.shape == (0,)
    for call in (cuda.upload, cuda.download):
        call(0, 0, 0, stream)
    assert "cudaMemcpyAsync" not in machine.calls()


def test_out_of_memory_says_how_much(machine: FakeMachine) -> None:
    machine.devices = [FakeDevice(memory=4096)]
    cuda = Cuda()
    cuda.allocate(1024)
    words = (
        r"^allocating 5000 bytes of GPU memory \(3072 of 4096 bytes are free\): "
        "cudaErrorMemoryAllocation: out of memory$"
    )
    with pytest.raises(CudaError, match=words) as caught:
        cuda.allocate(5000)
    assert caught.value.code == "cudaErrorMemoryAllocation"
    machine.fail_next["cudaMallocHost"] = "cudaErrorMemoryAllocation"
    with pytest.raises(CudaError, match="allocating 12 bytes of page-locked memory"):
        cuda.allocate_pinned(12)
    assert cuda.allocate(3072)


def test_freeing_never_raises(cuda: Cuda, machine: FakeMachine) -> None:
    buffer, address = cuda.allocate_pinned(8), cuda.allocate(8)
    for release in (cuda.free, cuda.destroy_stream, cuda.destroy_event, cuda.destroy_graph):
        release(0)
    for _ in range(2):
        cuda.free(address)
        cuda.free_pinned(buffer)
    cuda.destroy_graph(12345)
    assert len(machine.faults) == 3  # the double frees, which only the fake notices
    assert machine.leaks() == []


def test_events_time_the_stream(cuda: Cuda, machine: FakeMachine) -> None:
    stream, start, end = cuda.create_stream(), cuda.create_event(), cuda.create_event()
    with pytest.raises(CudaError, match="timing with CUDA events: cudaErrorInvalidResourceHandle"):
        cuda.elapsed(start, end)
    cuda.record(start, stream)
    cuda.record(end, stream)
    assert 0 <= cuda.elapsed(start, end) < 1
    cuda.record(end, stream)
    cuda.record(start, stream)
    with pytest.raises(CudaError, match="cudaErrorNotReady"):
        cuda.elapsed(start, end)  # start comes after end and nobody waited for it
    for event in (start, end):
        cuda.destroy_event(event)
    cuda.destroy_stream(stream)
    assert machine.leaks() == []


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("cudaMemGetInfo", lambda cuda: cuda.memory()),
        ("cudaMemcpyAsync", lambda cuda: cuda.upload(256, 512, 1, 0)),
        ("cudaStreamCreateWithFlags", lambda cuda: cuda.create_stream()),
        ("cudaEventCreate", lambda cuda: cuda.create_event()),
        ("cudaEventRecord", lambda cuda: cuda.record(1, 0)),
        ("cudaStreamBeginCapture", lambda cuda: cuda.begin_capture(0)),
        ("cudaGraphLaunch", lambda cuda: cuda.launch(1, 0)),
    ],
)
def test_every_call_is_checked(cuda: Cuda, machine: FakeMachine, function: str, call: Callable[[Cuda], Any]) -> None:
    machine.fail_next[function] = "cudaErrorInvalidValue"
    with pytest.raises(CudaError, match=r"^[^:]+: cudaErrorInvalidValue: invalid argument$"):
        call(cuda)


# Graphs


def test_a_graph_replays_with_its_own_addresses(cuda: Cuda, machine: FakeMachine) -> None:
    stream, address = cuda.create_stream(), cuda.allocate(4)
    source, target = pinned(cuda, b"\1\2\3\4"), cuda.allocate_pinned(4)
    cuda.begin_capture(stream)
    cuda.upload(address, source.address, 4, stream)
    cuda.download(target.address, address, 4, stream)
    graph, _ = cuda.end_capture(stream)
    cuda.synchronize(stream)
    assert set(target.array) == {255}  # recorded, not run
    for first in (9, 8):
        source.array[0] = first
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert target.array.tolist() == [first, 2, 3, 4]
    assert (machine.counts["captures"], machine.counts["launches"]) == (1, 2)
    cuda.free(address)
    cuda.launch(graph, stream)
    with pytest.raises(CudaError, match="waiting for the GPU: cudaErrorIllegalAddress"):
        cuda.synchronize(stream)
    cuda.destroy_graph(graph)
    assert "GraphExec" not in machine.leaks()
    assert "Graph" not in machine.leaks()


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda cuda, stream, address, machine: cuda.allocate(1),
        lambda cuda, stream, address, machine: cuda.allocate_pinned(1),
        lambda cuda, stream, address, machine: cuda.free(address),
        lambda cuda, stream, address, machine: cuda.synchronize(stream),
        lambda cuda, stream, address, machine: cuda.upload(address, np.zeros(4, np.uint8).ctypes.data, 4, stream),
        lambda cuda, stream, address, machine: machine.invalidate(stream),
    ],
)
def test_an_invalidated_capture_leaves_the_stream_usable(
    cuda: Cuda, machine: FakeMachine, forbidden: Callable[..., Any]
) -> None:
    stream, address, target = cuda.create_stream(), cuda.allocate(4), cuda.allocate_pinned(4)
    cuda.begin_capture(stream)
    with contextlib.suppress(CudaError):  # or nothing, where the caller ignores errors
        forbidden(cuda, stream, address, machine)
    with pytest.raises(CudaError, match="ending a CUDA graph") as caught:
        cuda.end_capture(stream)
    assert caught.value.code == "cudaErrorStreamCaptureInvalidated"
    cuda.download(target.address, address, 4, stream)
    cuda.synchronize(stream)
    assert set(machine.leaks()) == {"Stream", "device memory, 256 bytes", "pinned memory, 256 bytes"}


def test_a_failed_instantiation_drops_the_template(cuda: Cuda, machine: FakeMachine) -> None:
    stream = cuda.create_stream()
    machine.fail_next["cudaGraphInstantiate"] = "cudaErrorMemoryAllocation"
    cuda.begin_capture(stream)
    with pytest.raises(CudaError, match="instantiating a CUDA graph"):
        cuda.end_capture(stream)
    machine.fail_capture = True
    cuda.begin_capture(stream)
    with pytest.raises(CudaError, match="Invalidated"):
        cuda.end_capture(stream)
    assert machine.leaks() == ["Stream"]


@pytest.mark.gpu
def test_on_a_real_gpu() -> None:
    try:
        list_devices()
    except BackendError as error:
        pytest.skip(str(error))
    cuda, rows = Cuda(), np.arange(24, dtype=np.uint8)
    stream, start, end = cuda.create_stream(), cuda.create_event(), cuda.create_event()
    source, target, empty = cuda.allocate(24), cuda.allocate(12), cuda.allocate(0)
    upload, download = pinned(cuda, rows), cuda.allocate_pinned(12)

    def copies() -> None:
        cuda.upload(source, upload.address, 24, stream)
        cuda.copy_rows(target, 4, source + 2, 8, 4, 3, stream)
        cuda.download(download.address, target, 12, stream)

    cuda.record(start, stream)
    copies()
    cuda.record(end, stream)
    assert 0 < cuda.elapsed(start, end) < 1
    assert download.array.reshape(3, 4).tolist() == rows.reshape(3, 8)[:, 2:6].tolist()
    cuda.begin_capture(stream)
    copies()
    graph, _ = cuda.end_capture(stream)
    for shift in (100, 200):
        upload.array[:] = rows + shift
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert download.array.reshape(3, 4).tolist() == (rows + shift).reshape(3, 8)[:, 2:6].tolist()
    cuda.begin_capture(stream)
    with pytest.raises(CudaError):
        cuda.synchronize(stream)
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureInvalidated"):
        cuda.end_capture(stream)
    copies()
    cuda.synchronize(stream)
    with pytest.raises(CudaError, match="cudaErrorMemoryAllocation"):
        cuda.allocate(1 << 50)
    cuda.destroy_graph(graph)
    for event in (start, end):
        cuda.destroy_event(event)
    for address in (source, target, empty):
        cuda.free(address)
    cuda.free_pinned(upload)
    cuda.free_pinned(download)
    cuda.destroy_stream(stream)
