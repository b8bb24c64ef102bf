"""A stand-in for the module ``tensorrt`` (or ``tensorrt_rtx``) that runs ONNX files with ONNX Runtime.

Holds what the TensorRT runner uses, with the real names. An engine is JSON (``fake_engine_bytes``). What the real
library answers with undefined behaviour, this one refuses: in-place inputs and outputs, unaligned addresses, captured
graphs whose context is gone, or has its own memory and has changed.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime

from fakes import tensorrt_types as types
from fakes.machine import FakeMachine, Work
from fakes.tensorrt_types import (
    TYPES,
    DataType,
    Dims,
    ExecutionContextAllocationStrategy,
    ILogger,
    IRuntimeConfig,
    Severity,
    TensorIOMode,
)

Profile = Mapping[str, Sequence[Sequence[int]]]
"""Input name to its smallest, optimal and largest shape."""


def fake_engine_bytes(
    onnx: Path,
    profiles: Sequence[Profile],
    flavour: str = "tensorrt",
    version: str = "11.4.0",
    compute_capability: str = "9.0",
    activations: int = 1,
    user_allocation: bool = True,
) -> bytes:
    """A serialised engine that ``deserialize_cuda_engine`` of the same flavour, version and GPU accepts.

    Args:
        activations: how many times as much as usual it needs of them.
        user_allocation: built with the flag without which TensorRT-RTX lets nobody capture.
    """
    return json.dumps(
        {
            "fake_engine": 1,
            "onnx": str(Path(onnx).resolve()),
            "flavour": flavour,
            "version": version,
            "profiles": [
                {name: [list(shape) for shape in shapes] for name, shapes in each.items()} for each in profiles
            ],
            "compute_capability": compute_capability,
            "activations": activations,
            "user_allocation": user_allocation,
        }
    ).encode()


class _Tensor:
    """Name, mode, type and axes (numbers, or letters) of an input or output."""

    def __init__(self, about: Any, mode: TensorIOMode) -> None:
        self.name, self.mode, self.axes = about.name, mode, tuple(about.shape)
        self.kind, self.scalar = TYPES[about.type]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(each if isinstance(each, int) else sizes.get(each, -1) for each in self.axes)

    def size(self, sizes: Mapping[str, int]) -> int:
        return math.prod(self.shape(sizes)) * np.dtype(self.scalar).itemsize


@functools.lru_cache(maxsize=64)
def _session(path: str, changed: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=64)
def _scribble(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


class Runtime:
    """Bound to a machine by ``make_module``."""

    _machine: FakeMachine
    _flavour: str
    _version: str
    _engine_class: type

    def __init__(self, logger: ILogger) -> None:
        if not getattr(logger, "_ready", False):
            raise TypeError("ILogger.__init__() must be called when overriding __init__")
        self._logger = types.registered(logger)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        """The engine, or None; the reason is only in the log."""
        self._machine.log.append("deserialize_cuda_engine")
        here = self._machine.devices[self._machine.device].compute_capability
        try:
            found = json.loads(bytes(serialized_engine))
            if found["fake_engine"] != 1 or found["flavour"] != self._flavour:
                raise ValueError("the magic tag does not match")
            if found["version"] != self._version:
                raise ValueError(f"version tag {found['version']} does not match {self._version}")
            if found["compute_capability"] != here:
                raise ValueError(f"built for compute capability {found['compute_capability']}, this GPU has {here}")
            session = _session(found["onnx"], Path(found["onnx"]).stat().st_mtime_ns)
        except Exception as error:  # whatever is wrong with the bytes, the real library returns None
            self._logger.log(Severity.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization ({error})")
            return None
        return self._engine_class(self._machine, self._logger, session, found)


class ICudaEngine:
    _context_class: type

    def __init__(self, machine: FakeMachine, logger: ILogger, session: Any, about: Mapping[str, Any]) -> None:
        self._machine, self._logger, self._session = machine, logger, session
        self._profiles: list[Profile] = about["profiles"]
        self._activations: int = about["activations"]
        self._user_allocation: bool = about["user_allocation"]
        tensors = [_Tensor(each, TensorIOMode.INPUT) for each in session.get_inputs()]
        tensors += [_Tensor(each, TensorIOMode.OUTPUT) for each in session.get_outputs()]
        self._tensors = {each.name: each for each in tensors}
        self._inputs = [each for each in tensors if each.mode == TensorIOMode.INPUT]
        self._outputs = [each for each in tensors if each.mode == TensorIOMode.OUTPUT]

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_layers(self) -> int:
        return len(self._tensors) + 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._tensors[name].mode if name in self._tensors else TensorIOMode.NONE

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._tensors[name].kind

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._tensors[name].shape({}))

    def _limits(self, tensor: _Tensor, profile: int) -> list[tuple[int, ...]]:
        """Smallest, optimal and largest shape; a tensor of fixed shape needs no profile."""
        return [tuple(each) for each in self._profiles[profile].get(tensor.name, [tensor.shape({})] * 3)]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        return [Dims(each) for each in self._limits(self._tensors[name], profile_index)]

    def _arena(self, sizes: Mapping[str, int]) -> int:
        """Bytes of activations: some, and more for larger shapes."""
        blocks = sum(sizes.values()) + sum(-(-2 * each.size(sizes) // 256) for each in self._tensors.values())
        return self._activations * (4096 + 256 * blocks)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        sizes: dict[str, int] = {}
        for each in self._inputs:
            largest = zip(each.axes, self._limits(each, profile_index)[2], strict=True)
            sizes.update({axis: size for axis, size in largest if isinstance(axis, str)})
        return self._arena(sizes)

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> Any:
        self._machine.log.append("create_execution_context")
        return self._context_class(self, strategy)._ready()


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        self._engine, self._machine, self._strategy = engine, engine._machine, strategy
        self._profile, self._deferred, self._changes = 0, True, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] = (0, 0)
        self._needed: int | None = None
        self._managed = strategy == ExecutionContextAllocationStrategy.USER_MANAGED

    def _ready(self) -> IExecutionContext | None:
        """Takes the context's own memory; None when the GPU is full."""
        if self._machine.free_bytes() < self._machine.context_bytes:
            return self._fail("out of memory: no room for a context") or None
        self._machine.contexts.add(self)
        if not self._managed:
            profiles = range(self._engine.num_optimization_profiles)
            size = max(self._engine.get_device_memory_size_for_profile_v2(each) for each in profiles)
            address = self._machine.allocate("device", size)
            if not address:
                self._fail(f"out of memory: {size} bytes of activations")
                return None
            self._memory = (address, size)
            weakref.finalize(self, self._machine.release, "device", address)
        return self

    def _fail(self, reason: str) -> bool:
        self._engine._logger.log(Severity.ERROR, f"IExecutionContext: {reason}")
        return False

    def _changed(self) -> None:
        self._deferred, self._needed = True, None
        self._changes += 1

    def _sizes(self) -> dict[str, int]:
        """Letter to size. Raises RuntimeError where inputs contradict each other."""
        sizes: dict[str, int] = {}
        for each in self._engine._inputs:
            for axis, size in zip(each.axes, self._shapes.get(each.name, ()), strict=False):
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    self._fail(f"{each.name} has {axis} = {size}, another input {sizes[axis]}")
                    raise RuntimeError("shape inference failed")
        return sizes

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._machine.log.append(f"set_optimization_profile_async {profile_index}")
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._fail(f"there is no optimization profile {profile_index}")
        if self._machine.capturing(stream_handle):
            self._machine.invalidate(stream_handle)
            return self._fail("the profile was switched on a capturing stream")
        if profile_index != self._profile:
            self._profile = profile_index
            self._shapes.clear()
            self._changed()
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._machine.log.append(f"set_input_shape {name} {tuple(shape)}")
        tensor, wanted = self._engine._tensors.get(name), tuple(shape)
        if tensor is None or tensor.mode != TensorIOMode.INPUT:
            return self._fail(f"there is no input {name}")
        smallest, _, largest = self._engine._limits(tensor, self._profile)
        within = zip(smallest, wanted, largest, strict=False)
        if len(wanted) != len(smallest) or not all(a <= n <= b for a, n, b in within):
            bounds = f"[{smallest} to {largest}] of profile {self._profile}"
            return self._fail(f"setInputShape: {name} {wanted} is outside {bounds}")
        if self._shapes.get(name) != wanted:
            self._shapes[name] = wanted
            self._changed()
        return True

    def infer_shapes(self) -> list[str]:
        self._sizes()
        return [each.name for each in self._engine._inputs if -1 in self._shape(each)]

    def _shape(self, tensor: _Tensor) -> tuple[int, ...]:
        if tensor.mode == TensorIOMode.INPUT:
            return self._shapes.get(tensor.name, tensor.shape({}))
        return tensor.shape(self._sizes())

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._shape(self._engine._tensors[name]))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            return self._fail(f"there is no tensor {name}")
        if memory % self._machine.alignment:
            return self._fail(f"the address of {name} is not aligned to {self._machine.alignment} bytes")
        self._addresses[name] = int(memory)
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        if self.infer_shapes():
            self._fail("updateDeviceMemorySizeForShapes before all shapes are known")
            return 0
        if self._machine.fail_sizes:
            self._fail("updateDeviceMemorySizeForShapes: injected failure")
            return 0
        self._needed = self._engine._arena(self._sizes())
        return self._needed

    def set_device_memory(self, memory: int, size: int) -> None:
        if not self._managed or memory % 256:
            self._fail("setDeviceMemory wants a USER_MANAGED context and an address aligned to 256 bytes")
            return
        self._memory = (int(memory), int(size))

    def execute_async_v3(self, stream_handle: int) -> bool:
        machine, engine = self._machine, self._engine
        machine.log.append(f"execute_async_v3 {stream_handle}")
        machine.counts["enqueues"] += 1
        machine.on_enqueue()
        if machine.counts["enqueues"] == machine.fail_enqueue_after:
            return self._fail("enqueueV3: injected failure")
        if not stream_handle:
            engine._logger.log(Severity.WARNING, "Using default stream in enqueueV3() may lead to performance issues")
        if missing := self.infer_shapes():
            return self._fail(f"enqueueV3: no shape for {', '.join(missing)}")
        if missing := [name for name in engine._tensors if not self._addresses.get(name)]:
            return self._fail(f"enqueueV3: no address for {', '.join(missing)}")
        needed = self._needed or engine.get_device_memory_size_for_profile_v2(self._profile)
        if self._memory[1] < needed or not machine.inside(("device", *self._memory)):
            return self._fail(f"enqueueV3: device memory {self._memory} is not {needed} live bytes")
        if machine.capturing(stream_handle):
            if self._deferred:
                machine.invalidate(stream_handle)
                return self._fail("enqueueV3: first call after a change of shapes or profile, on a capturing stream")
        else:
            self._deferred = False
        work = self._work(needed, machine.capturing(stream_handle))
        if any(a < d + m and d < a + n for _, a, n in work.reads for _, d, m in work.writes):
            return self._fail("enqueueV3: an input overlaps an output or the activations")
        machine.enqueue(stream_handle, work)
        return True

    def _work(self, needed: int, captured: bool) -> Work:
        """The kernels of one call, with everything as it is now."""
        session, sizes = self._engine._session, self._sizes()
        bound = [(each, self._shape(each), self._addresses[each.name]) for each in self._engine._tensors.values()]
        inputs = [each for each in bound if each[0].mode == TensorIOMode.INPUT]
        outputs = [each for each in bound if each[0].mode == TensorIOMode.OUTPUT]
        arena, changes, me = self._memory[0], self._changes, weakref.ref(self)
        fixed, scribble = captured and not self._managed, _scribble(needed)

        def alive() -> str | None:
            context = me()
            if context is None:
                return "its execution context is gone"
            return "its context was changed since" if fixed and context._changes != changes else None

        def run() -> None:
            # Before and after: neither an input that lies there nor an output must survive.
            ctypes.memmove(arena, scribble, needed)
            feeds = {}
            for tensor, shape, address in inputs:
                size = tensor.size(sizes)
                feeds[tensor.name] = np.frombuffer(ctypes.string_at(address, size), tensor.scalar).reshape(shape)
            for (_, shape, address), value in zip(outputs, session.run(None, feeds), strict=True):
                assert value.shape == shape, (value.shape, shape)
                ctypes.memmove(address, np.ascontiguousarray(value).ctypes.data, value.nbytes)
            ctypes.memmove(arena, scribble, needed)

        def reach(bound: list[Any]) -> list[tuple[str, int, int]]:
            return [("device", address, tensor.size(sizes)) for tensor, _, address in bound]

        writes = (*reach(outputs), ("device", arena, needed))
        return Work("enqueueV3", run, tuple(reach(inputs)), writes, alive)


class _RtxContext(IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return bool(stream) and not self._deferred and self._engine._user_allocation


class _RtxEngine(ICudaEngine):
    _context_class = _RtxContext

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> Any:
        if isinstance(strategy, IRuntimeConfig):
            self._machine.log.append(f"cuda_graph_strategy {strategy._graphs.name}")
            self._machine.log.append(f"kernel_specialization {strategy._kernels}")
            strategy = strategy._strategy
        return super().create_execution_context(strategy)


ICudaEngine._context_class = IExecutionContext


def make_module(machine: FakeMachine, flavour: str = "tensorrt", version: str = "11.4.0") -> ModuleType:
    """The module over a machine; ``flavour`` is ``tensorrt`` or ``tensorrt-rtx``."""
    rtx = flavour == "tensorrt-rtx"
    module: Any = ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    engine = _RtxEngine if rtx else ICudaEngine
    bound = {"_machine": machine, "_flavour": flavour, "_version": version, "_engine_class": engine}
    module.__version__ = version
    module.Runtime = type("Runtime", (Runtime,), bound)
    module.ICudaEngine, module.IExecutionContext = engine, engine._context_class
    module.ILogger = type("ILogger", (ILogger,), {"_first": None})
    module.Dims, module.nptype, module.Builder = Dims, types.nptype, types.Builder
    module.DataType, module.TensorIOMode = DataType, TensorIOMode
    module.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    if rtx:
        module.IRuntimeConfig, module.IRuntimeCache = IRuntimeConfig, types.IRuntimeCache
        module.CudaGraphStrategy = types.CudaGraphStrategy
        module.DynamicShapesKernelSpecializationStrategy = types.DynamicShapesKernelSpecializationStrategy
    return module
