"""The CUDA calls behind the TensorRT backend, through ``cuda.bindings.runtime`` 12 or 13.

Knows nothing of engines. Addresses, streams, events and graphs are plain ints, since that is what TensorRT takes.
Importing this module needs neither cuda-bindings nor a driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError

INSTALL = "pip install 'gtr-deploy[tensorrt]'"
OLDER_DRIVER = "with CUDA 12's pip install 'gtr-deploy[tensorrt-cu12]' or 'gtr-deploy[tensorrt-rtx-cu12]'"
SMALLEST_ALLOCATION = 256
"""Bytes. TensorRT wants an address even for an empty tensor, and CUDA gives none for 0 bytes."""

NO_DRIVER = "no NVIDIA driver is installed"


class CudaError(BackendError):
    """A CUDA call failed: CUDA's name of the error, and what is wrong, without what was tried."""

    def __init__(self, attempt: str, code: str, text: str) -> None:
        super().__init__(f"{attempt}: {code}: {text}")
        self.code, self.text = code, text


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        compute_capability: such as ``9.0``.
        memory: bytes.
        driver: the newest CUDA version the driver runs; the driver's own version where only nvidia-smi could be asked.
    """

    name: str
    compute_capability: str
    memory: int
    driver: str


@dataclass(frozen=True, eq=False)
class PinnedBuffer:
    """Page-locked host memory. ``array`` [bytes] is a view of it, and dangles once the buffer is freed."""

    address: int
    array: NDArray[np.uint8] = field(repr=False)


def list_devices() -> list[Gpu]:
    """The GPUs that CUDA sees, at least one, in the order of their indices.

    Raises:
        BackendError: cuda-bindings is missing.
        CudaError: there is no driver or no GPU, or the driver is too old for cuda-bindings.
    """
    return _devices(_load())


def no_such_gpu(count: int) -> str:
    """What is said of an index that none of ``count`` GPUs has."""
    return "this machine has " + ("1 GPU, number 0" if count == 1 else f"{count} GPUs, numbers 0 to {count - 1}")


class Cuda:
    """One GPU. CUDA selects devices per thread: use an instance from the thread that made it.

    Every method raises CudaError when CUDA refuses; those that free never raise, so that a teardown after a failure
    neither hides the failure nor stops half way.
    """

    def __init__(self, device: int = 0) -> None:
        """Selects a GPU.

        Raises:
            BackendError: as ``list_devices``, or there is no GPU with this index.
        """
        self._runtime = _load()
        devices = _devices(self._runtime)
        if not 0 <= device < len(devices):
            raise CudaError(f"selecting GPU {device}", "cudaErrorInvalidDevice", no_such_gpu(len(devices)))
        self._check(f"selecting GPU {device}", self._runtime.cudaSetDevice(device))
        self.device = devices[device]

    def _check(self, attempt: str, result: tuple[Any, ...]) -> Any:
        return _check(self._runtime, attempt, result)

    def _release(self, call: str, handle: int) -> None:
        if handle:
            with contextlib.suppress(Exception):
                getattr(self._runtime, call)(handle)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        return self._check("asking for the free GPU memory", self._runtime.cudaMemGetInfo())

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes of GPU memory, aligned to 256 bytes; 0 bytes also get an address of their own."""
        result = self._runtime.cudaMalloc(max(size, SMALLEST_ALLOCATION))
        attempt = f"allocating {size} bytes of GPU memory"
        if _code(result) == "cudaErrorMemoryAllocation":
            free, total = self.memory()
            attempt += f" ({free} of {total} bytes are free)"
        return int(self._check(attempt, result))

    def free(self, address: int) -> None:
        """Gives GPU memory back; 0 is ignored. Work that still uses it must have been synchronised."""
        self._release("cudaFree", address)

    def allocate_pinned(self, size: int) -> PinnedBuffer:
        """``size`` bytes of page-locked host memory."""
        attempt = f"allocating {size} bytes of page-locked memory"
        address = int(self._check(attempt, self._runtime.cudaMallocHost(max(size, SMALLEST_ALLOCATION))))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return PinnedBuffer(address, array)

    def free_pinned(self, buffer: PinnedBuffer) -> None:
        """Gives page-locked memory back; no view of ``buffer.array`` may be used after this."""
        self._release("cudaFreeHost", buffer.address)

    def upload(self, destination: int, source: int, size: int, stream: int) -> None:
        """Queues a copy of ``size`` bytes from a host address; a pinned source is read when the copy runs."""
        self._copy("to the GPU", "cudaMemcpyHostToDevice", destination, source, size, stream)

    def download(self, destination: int, source: int, size: int, stream: int) -> None:
        """Queues a copy of ``size`` bytes to a host address, which holds them once the stream is synchronised."""
        self._copy("from the GPU", "cudaMemcpyDeviceToHost", destination, source, size, stream)

    def _copy(self, where: str, kind: str, destination: int, source: int, size: int, stream: int) -> None:
        if size:
            direction = getattr(self._runtime.cudaMemcpyKind, kind)
            result = self._runtime.cudaMemcpyAsync(destination, source, size, direction, stream)
            self._check(f"copying {size} bytes {where}", result)

    def copy_rows(
        self, destination: int, pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """Queues a copy of rows of ``width`` bytes within the GPU, not overlapping; pitches: bytes from row to row."""
        if width and rows:
            within = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            places = destination, pitch, source, source_pitch
            result = self._runtime.cudaMemcpy2DAsync(*places, width, rows, within, stream)
            self._check(f"copying {rows} rows of {width} bytes within the GPU", result)

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        flags = self._runtime.cudaStreamNonBlocking
        return int(self._check("creating a CUDA stream", self._runtime.cudaStreamCreateWithFlags(flags)))

    def destroy_stream(self, stream: int) -> None:
        """Gives a stream back; 0 is ignored."""
        self._release("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Waits for everything queued on a stream; errors of that work surface here."""
        self._check("waiting for the GPU", self._runtime.cudaStreamSynchronize(stream))

    def create_event(self) -> int:
        """An event that keeps time."""
        return int(self._check("creating a CUDA event", self._runtime.cudaEventCreate()))

    def record(self, event: int, stream: int) -> None:
        """Queues the event: it happens when the stream gets there."""
        self._check("recording a CUDA event", self._runtime.cudaEventRecord(event, stream))

    def elapsed(self, start: int, end: int) -> float:
        """Seconds between two recorded events; waits for ``end``."""
        self._check("waiting for a CUDA event", self._runtime.cudaEventSynchronize(end))
        return self._check("timing with CUDA events", self._runtime.cudaEventElapsedTime(start, end)) / 1000

    def destroy_event(self, event: int) -> None:
        """Gives an event back; 0 is ignored."""
        self._release("cudaEventDestroy", event)

    def begin_capture(self, stream: int) -> None:
        """Work on the stream is now recorded, not run; this thread may not allocate, free or synchronise meanwhile."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check("beginning a CUDA graph", self._runtime.cudaStreamBeginCapture(stream, mode))

    def end_capture(self, stream: int, most_nodes: int | None = None) -> tuple[int, int]:
        """The recorded work as an executable graph that lies on the GPU, ready to be launched; and its nodes.

        Raises:
            CudaError: something in the capture was not allowed, there is no memory for it, or it has more than
                ``most_nodes``; the stream is usable again.
        """
        graph = self._check("ending a CUDA graph", self._runtime.cudaStreamEndCapture(stream))
        attempt, executable = "instantiating a CUDA graph", 0
        try:
            _, nodes = self._check(attempt, self._runtime.cudaGraphGetNodes(graph))
            if most_nodes is not None and nodes > most_nodes:
                raise CudaError(attempt, "cudaErrorMemoryAllocation", f"{nodes} nodes, of which {most_nodes} may be")
            executable = int(self._check(attempt, self._runtime.cudaGraphInstantiate(graph, 0)))
            self._check("uploading a CUDA graph", self._runtime.cudaGraphUpload(executable, stream))
        except BaseException:
            self.destroy_graph(executable)
            raise
        finally:
            self._release("cudaGraphDestroy", int(graph))
        return executable, nodes

    def capture(self, stream: int, record: Callable[[], None], most_nodes: int | None = None) -> tuple[int, int]:
        """What ``record`` queues on the stream, as :meth:`end_capture` returns it.

        The garbage collector rests meanwhile: a destructor that frees GPU memory would spoil the capture.

        Raises:
            CudaError: as :meth:`end_capture`. What ``record`` raises, Ctrl-C too; the stream is usable again.
        """
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        try:
            try:
                self.begin_capture(stream)
                record()
            except BaseException:
                with contextlib.suppress(CudaError):
                    graph = self._check("dropping a CUDA graph", self._runtime.cudaStreamEndCapture(stream))
                    self._release("cudaGraphDestroy", int(graph))
                raise
            return self.end_capture(stream, most_nodes)
        finally:
            if collecting:
                gc.enable()

    def launch(self, executable: int, stream: int) -> None:
        """Queues a graph: the recorded work, with the addresses of the recording."""
        self._check("launching a CUDA graph", self._runtime.cudaGraphLaunch(executable, stream))

    def destroy_graph(self, executable: int) -> None:
        """Gives an executable graph back; 0 is ignored."""
        self._release("cudaGraphExecDestroy", executable)


def _load() -> ModuleType:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        raise BackendError(f"cuda-bindings is not installed; {INSTALL}") from None


def _devices(runtime: ModuleType) -> list[Gpu]:
    looking = "looking for a GPU"
    try:
        driver = _check(runtime, looking, runtime.cudaDriverGetVersion())
        version = _check(runtime, looking, runtime.cudaRuntimeGetVersion())
        counted = runtime.cudaGetDeviceCount()
    except RuntimeError:
        # cuda-bindings 12.8 raises where libcuda.so is missing; from 12.9 on the driver has version 0 then.
        driver, version, counted = 0, 0, (None, 0)
    code = _code(counted)
    old = "cudaErrorInsufficientDriver"
    if driver == 0:
        raise CudaError(looking, old, f"{NO_DRIVER}; install one, then check it with nvidia-smi")
    if code == old:
        text = f"the driver supports CUDA {_version(driver)}, cuda-bindings needs CUDA {version // 1000}.0; "
        raise CudaError(looking, code, f"{text}update the driver, or {OLDER_DRIVER}")
    if code == "cudaErrorNoDevice" or counted[1] == 0:
        text = f"driver {_version(driver)} sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
        raise CudaError(looking, "cudaErrorNoDevice", text)
    found: list[Gpu] = []
    for index in range(_check(runtime, looking, counted)):
        about = _check(runtime, f"asking about GPU {index}", runtime.cudaGetDeviceProperties(index))
        name = about.name.decode(errors="replace").rstrip("\0")
        found.append(Gpu(name, f"{about.major}.{about.minor}", about.totalGlobalMem, _version(driver)))
    return found


def _check(runtime: ModuleType, attempt: str, result: tuple[Any, ...]) -> Any:
    """The value, or values, of a call."""
    error, *values = result
    if error != runtime.cudaError_t.cudaSuccess:
        text = runtime.cudaGetErrorString(error)[1]
        raise CudaError(attempt, _code(result), text.decode() if isinstance(text, bytes) else str(text))
    return values[0] if len(values) == 1 else tuple(values)


def _code(result: tuple[Any, ...]) -> str:
    return getattr(result[0], "name", str(result[0]))


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
