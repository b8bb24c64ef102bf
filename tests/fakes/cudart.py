"""A stand-in for ``cuda.bindings.runtime``: what runtime/cuda.py uses, with the real names and return conventions."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fakes.machine import OK, TEXTS, Error, Event, FakeDevice, FakeMachine, Graph, GraphExec, Range, Stream, Work

__all__ = ["FakeDevice", "FakeMachine", "install", "make_module"]

COPY_KINDS = ("cudaMemcpyHostToHost", "cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice")
CopyKind: Any = IntEnum("cudaMemcpyKind", COPY_KINDS, start=0)
MODES = {"cudaStreamCaptureModeGlobal": 0, "cudaStreamCaptureModeThreadLocal": 1, "cudaStreamCaptureModeRelaxed": 2}
CaptureMode: Any = IntEnum("cudaStreamCaptureMode", MODES)

VALUES = {
    "cudaDriverGetVersion": 1,
    "cudaRuntimeGetVersion": 1,
    "cudaGetErrorString": 1,
    "cudaGetDeviceCount": 1,
    "cudaGetDeviceProperties": 1,
    "cudaMemGetInfo": 2,
    "cudaMalloc": 1,
    "cudaMallocHost": 1,
    "cudaStreamCreateWithFlags": 1,
    "cudaEventCreate": 1,
    "cudaEventElapsedTime": 1,
    "cudaStreamEndCapture": 1,
    "cudaGraphGetNodes": 2,
    "cudaGraphInstantiate": 1,
}
"""How many values follow the error; they are None when there is an error."""
WITHOUT_DEVICE = ("cudaDriverGetVersion", "cudaRuntimeGetVersion", "cudaGetErrorString")


def _handle_type(name: str) -> type:
    """A handle as cuda-bindings returns it: not an int, but convertible to one."""

    def init(self: Any, number: int = 0) -> None:
        self._number = number

    return type(name, (), {"__init__": init, "__int__": lambda self: self._number})


HANDLES = {name: _handle_type(name) for name in ("cudaStream_t", "cudaEvent_t", "cudaGraph_t", "cudaGraphExec_t")}


class Calls:
    """The functions. Each returns an error, or a tuple of values that means success."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine

    def _get(self, handle: Any, kind: type) -> Any:
        thing = self.machine.handles.get(int(handle))
        return thing if type(thing) is kind else None

    def _new(self, kind: str, thing: Any) -> tuple[Any]:
        return (HANDLES[kind](self.machine.handle(thing)),)

    def _destroy(self, handle: Any, kind: type) -> Any:
        if not int(handle) or self._get(handle, kind) is None:
            self.machine.faults.append(f"destroying {int(handle):#x}, which is no live {kind.__name__}")
            return Error.cudaErrorInvalidResourceHandle
        del self.machine.handles[int(handle)]
        return OK

    # Devices and memory

    def cudaDriverGetVersion(self) -> Any:
        return (self.machine.driver_version,)

    def cudaRuntimeGetVersion(self) -> Any:
        return (self.machine.runtime_version,)

    def cudaGetErrorString(self, error: Any) -> Any:
        return (TEXTS[error.name][1].encode(),)

    def cudaGetDeviceCount(self) -> Any:
        return (len(self.machine.devices),)

    def cudaSetDevice(self, device: int) -> Any:
        if not 0 <= device < len(self.machine.devices):
            return Error.cudaErrorInvalidDevice
        self.machine.device = device
        return OK

    def cudaGetDeviceProperties(self, device: int) -> Any:
        if not 0 <= device < len(self.machine.devices):
            return Error.cudaErrorInvalidDevice
        about = self.machine.devices[device]
        major, minor = map(int, about.compute_capability.split("."))
        return (SimpleNamespace(name=about.name.encode(), major=major, minor=minor, totalGlobalMem=about.memory),)

    def cudaMemGetInfo(self) -> Any:
        return self.machine.free_bytes(), self.machine.devices[self.machine.device].memory

    def _allocate(self, space: str, size: int) -> Any:
        if self.machine.forbidden():
            return Error.cudaErrorStreamCaptureUnsupported
        address = self.machine.allocate(space, size) if size else 0
        return (address,) if address or not size else Error.cudaErrorMemoryAllocation

    def _free(self, space: str, address: int) -> Any:
        if self.machine.forbidden():
            return Error.cudaErrorStreamCaptureUnsupported
        return OK if not address or self.machine.release(space, address) else Error.cudaErrorInvalidValue

    def cudaMalloc(self, size: int) -> Any:
        return self._allocate("device", size)

    def cudaFree(self, address: int) -> Any:
        return self._free("device", address)

    def cudaMallocHost(self, size: int) -> Any:
        return self._allocate("pinned", size)

    def cudaFreeHost(self, address: int) -> Any:
        return self._free("pinned", address)

    # Copies

    def cudaMemcpyAsync(self, destination: int, source: int, size: int, kind: Any, stream: Any) -> Any:
        machine, number = self.machine, int(stream)
        if self._get(stream, Stream) is None:
            return Error.cudaErrorInvalidResourceHandle
        to_device = kind in (CopyKind.cudaMemcpyHostToDevice, CopyKind.cudaMemcpyDeviceToDevice)
        from_device = kind in (CopyKind.cudaMemcpyDeviceToHost, CopyKind.cudaMemcpyDeviceToDevice)
        target = "device" if to_device else machine.space_of(destination)
        origin = "device" if from_device else machine.space_of(source)
        wrong_side = (not to_device and target == "device") or (not from_device and origin == "device")
        overlap = source < destination + size and destination < source + size
        if wrong_side or overlap or not (to_device or from_device):
            return Error.cudaErrorInvalidValue
        pageable = "pageable" in (target, origin)
        if pageable:
            if machine.capturing(number):
                machine.invalidate(number)
                return Error.cudaErrorStreamCaptureUnsupported
            machine.counts["pageable_copies"] += 1
        # CUDA has read a pageable source when it returns, and a pinned one when the copy runs.
        snapshot = ctypes.string_at(source, size) if origin == "pageable" else source
        counter = "uploaded" if not from_device else "copied" if to_device else "downloaded"

        def run() -> None:
            ctypes.memmove(destination, snapshot, size)
            machine.counts[counter] += size

        def reach(space: str, address: int) -> tuple[Range, ...]:
            return () if space == "pageable" else ((space, address, size),)

        work = Work(f"{kind.name} of {size} bytes", run, reach(origin, source), reach(target, destination))
        machine.enqueue(number, work)
        return machine.drain(number) if target == "pageable" else OK

    def cudaMemcpy2DAsync(
        self,
        destination: int,
        to_pitch: int,
        source: int,
        from_pitch: int,
        width: int,
        rows: int,
        kind: Any,
        stream: Any,
    ) -> Any:
        if self._get(stream, Stream) is None:
            return Error.cudaErrorInvalidResourceHandle
        if kind != CopyKind.cudaMemcpyDeviceToDevice:
            return Error.cudaErrorInvalidValue
        if width > min(to_pitch, from_pitch):
            return Error.cudaErrorInvalidPitchValue

        def run() -> None:
            for row in range(rows):
                ctypes.memmove(destination + row * to_pitch, source + row * from_pitch, width)
            self.machine.counts["copied"] += rows * width

        reads = ("device", source, (rows - 1) * from_pitch + width)
        writes = ("device", destination, (rows - 1) * to_pitch + width)
        name = f"2D copy of {rows} rows of {width} bytes"
        self.machine.enqueue(int(stream), Work(name, run, (reads,), (writes,)))
        return OK

    # Streams and events

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return self._new("cudaStream_t", Stream()) if flags in (0, 1) else Error.cudaErrorInvalidValue

    def cudaStreamDestroy(self, stream: Any) -> Any:
        if int(stream) and self._get(stream, Stream) is not None:
            self.machine.drain(int(stream))
        return self._destroy(stream, Stream)

    def cudaStreamSynchronize(self, stream: Any) -> Any:
        if self._get(stream, Stream) is None:
            return Error.cudaErrorInvalidResourceHandle
        if self.machine.capturing(int(stream)):
            self.machine.invalidate(int(stream))
            return Error.cudaErrorStreamCaptureUnsupported
        return self.machine.drain(int(stream))

    def cudaEventCreate(self) -> Any:
        return self._new("cudaEvent_t", Event())

    def cudaEventDestroy(self, event: Any) -> Any:
        return self._destroy(event, Event)

    def cudaEventRecord(self, event: Any, stream: Any) -> Any:
        found = self._get(event, Event)
        if found is None or self._get(stream, Stream) is None:
            return Error.cudaErrorInvalidResourceHandle

        def run() -> None:
            found.at, found.pending = time.perf_counter(), None

        found.captured = self.machine.capturing(int(stream))
        work = Work("event", (lambda: None) if found.captured else run)
        found.at, found.pending, found.stream = None, work, int(stream)
        self.machine.enqueue(int(stream), work)
        return OK

    def cudaEventSynchronize(self, event: Any) -> Any:
        found = self._get(event, Event)
        if found is None:
            return Error.cudaErrorInvalidResourceHandle
        if found.captured:
            return Error.cudaErrorCapturedEvent
        return self.machine.drain(found.stream, found.pending) if found.pending else OK

    def cudaEventElapsedTime(self, start: Any, end: Any) -> Any:
        both = self._get(start, Event), self._get(end, Event)
        if any(each is None or each.captured or (each.at is None and not each.pending) for each in both):
            return Error.cudaErrorInvalidResourceHandle
        if any(each.pending for each in both):
            return Error.cudaErrorNotReady
        return ((both[1].at - both[0].at) * 1000,)

    # Graphs

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        found = self._get(stream, Stream)
        if found is None or not int(stream) or CaptureMode(mode) != CaptureMode.cudaStreamCaptureModeThreadLocal:
            return Error.cudaErrorStreamCaptureUnsupported
        if found.recording is not None:
            return Error.cudaErrorInvalidValue
        found.recording, found.invalid, found.thread = [], self.machine.fail_capture, threading.get_ident()
        return OK

    def cudaStreamEndCapture(self, stream: Any) -> Any:
        found = self._get(stream, Stream)
        if found is None or found.recording is None:
            return Error.cudaErrorInvalidValue
        works, invalid = found.recording, found.invalid
        found.recording, found.invalid = None, False
        if invalid:
            return Error.cudaErrorStreamCaptureInvalidated
        self.machine.counts["captures"] += 1
        return self._new("cudaGraph_t", Graph(works))

    def cudaGraphGetNodes(self, graph: Any) -> Any:
        found = self._get(graph, Graph)
        return ([], len(found.works)) if found is not None else Error.cudaErrorInvalidValue

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        found = self._get(graph, Graph)
        if found is None or flags:
            return Error.cudaErrorInvalidValue
        if len(found.works) * self.machine.node_bytes > self.machine.free_bytes():
            return Error.cudaErrorMemoryAllocation
        return self._new("cudaGraphExec_t", GraphExec(list(found.works)))

    def cudaGraphDestroy(self, graph: Any) -> Any:
        return self._destroy(graph, Graph)

    def cudaGraphExecDestroy(self, executable: Any) -> Any:
        return self._destroy(executable, GraphExec)

    def cudaGraphUpload(self, executable: Any, stream: Any) -> Any:
        found = self._get(executable, GraphExec)
        if found is None or self._get(stream, Stream) is None:
            return Error.cudaErrorInvalidResourceHandle
        found.uploaded = True
        return OK

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> Any:
        found = self._get(executable, GraphExec)
        if found is None or self._get(stream, Stream) is None:
            return Error.cudaErrorInvalidResourceHandle
        self.machine.counts["launches"] += 1
        self.machine.counts["cold_launches"] += not found.uploaded
        found.uploaded = True
        for work in found.works:
            self.machine.enqueue(int(stream), work)
        return OK


def _unavailable(machine: FakeMachine, name: str) -> Any:
    """The error of every call that needs a device, where there is none, or it is broken."""
    if name in WITHOUT_DEVICE:
        return OK
    if machine.driver_version // 1000 < machine.runtime_version // 1000:
        return Error.cudaErrorInsufficientDriver
    return machine.broken if machine.devices else Error.cudaErrorNoDevice


def _function(machine: FakeMachine, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def function(*arguments: Any) -> tuple[Any, ...]:
        shown = [getattr(each, "name", None) or str(int(each)) for each in arguments]
        machine.log.append(" ".join([name, *shown]))
        error = machine.fail_next.pop(name, None)
        error = _unavailable(machine, name) if error is None else Error[getattr(error, "name", error)]
        # Freeing also works on a broken device, so that tests see what a teardown forgets.
        if error == OK or (error == machine.broken and ("Destroy" in name or "Free" in name)):
            result = call(*arguments)
            if isinstance(result, tuple):
                return (OK, *result)
            error = result if error == OK else error
        return (error, *[None] * VALUES.get(name, 0))

    return function


def make_module(machine: FakeMachine) -> ModuleType:
    """The module over a machine."""
    module: Any = ModuleType("cuda.bindings.runtime")
    calls = Calls(machine)
    for name in dir(calls):
        if name.startswith("cuda"):
            setattr(module, name, _function(machine, name, getattr(calls, name)))
    module.cudaError_t, module.cudaMemcpyKind, module.cudaStreamCaptureMode = Error, CopyKind, CaptureMode
    module.cudaStreamNonBlocking = 1
    for name, handle in HANDLES.items():
        setattr(module, name, handle)
    return module


def install(monkeypatch: pytest.MonkeyPatch, machine: FakeMachine) -> ModuleType:
    """Makes ``from cuda.bindings import runtime`` give the fake until the test ends; returns it."""
    module, bindings, top = make_module(machine), ModuleType("cuda.bindings"), ModuleType("cuda")
    bindings.runtime, top.bindings = module, bindings  # pyright: ignore[reportAttributeAccessIssue]
    for name, each in (("cuda", top), ("cuda.bindings", bindings), ("cuda.bindings.runtime", module)):
        each.__path__ = []
        monkeypatch.setitem(sys.modules, name, each)
    return module
