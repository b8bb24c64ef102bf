"""One TensorRT or TensorRT-RTX engine, and its execution contexts: one per shape.

A context whose shapes never change needs its shapes set once, and can be captured into a CUDA graph: after a change of
shape TensorRT puts deferred work into the next enqueue, which must not be recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ...bundle.engine_sets import FLAVOURS, EngineSet, rebuild_command, uncovered
from ...bundle.reader import Bundle
from ...errors import BackendError
from ...files import atomic_path, cache_dir
from ...models.graphs import GraphSpec
from ...sampling.shapes import covering
from .library import LogCollector

_DTYPES = {"FLOAT": "float32", "INT64": "int64", "UINT8": "uint8"}


class NoContextError(BackendError):
    """The library makes no execution context: mostly, there is no memory for it."""


class EngineCall:
    """An execution context at one shape.

    Attributes:
        kind: of the graph.
        memory: bytes of activations that it needs; they may be shared with other calls on the same stream.
        users: how many need it.
    """

    def __init__(self, kind: str, context: Any, memory: int, log: LogCollector) -> None:
        self.kind, self.memory, self.users = kind, memory, 0
        self._log = log
        self._context: Any = context

    def set_memory(self, address: int, size: int) -> None:
        """Where the activations lie; at least ``memory`` bytes."""
        self._context.set_device_memory(address, size)

    def capturable(self, stream: int) -> bool:
        """Whether the library says that this call may be captured (TensorRT-RTX can tell; TensorRT always may)."""
        context = self._context
        return not hasattr(context, "is_stream_capturable") or bool(context.is_stream_capturable(stream))

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        """Queues the graph once; every input and output needs an address that is a multiple of 256.

        Raises:
            BackendError: TensorRT refuses; with the line that it logged.
        """
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise BackendError(f"the {self.kind} engine has no tensor {name}: {self._log.last_error()}")
        if not self._context.execute_async_v3(stream):
            raise BackendError(f"the {self.kind} engine failed: {self._log.last_error()}")

    def close(self) -> None:
        """Destroys the context; nothing of it may still be running."""
        self._context = None


class RuntimeCache:
    """TensorRT-RTX compiles kernels when a context is made: once for all contexts of an engine, and kept on disk.

    The library checks a stored cache against version, GPU and driver by itself, and starts afresh if it does not fit.
    """

    def __init__(self, engine_sha256: str) -> None:
        self._path = cache_dir() / "kernels" / f"{engine_sha256}.cache"
        self._runtime_cache: Any = None
        self._loaded = b""

    def attach(self, runtime_config: Any) -> None:
        """Gives a context's settings the engine's cache."""
        if self._runtime_cache is None:
            self._runtime_cache = runtime_config.create_runtime_cache()
            with contextlib.suppress(OSError):
                self._loaded = self._path.read_bytes()
                self._runtime_cache.deserialize(self._loaded)
        runtime_config.set_runtime_cache(self._runtime_cache)

    def save(self) -> None:
        """Keeps what was compiled; a cache that cannot be written only costs time."""
        if self._runtime_cache is None:
            return
        serialized = self._runtime_cache.serialize()
        content = b"" if serialized is None else bytes(serialized)
        if content and content != self._loaded:
            self._loaded = content
            with contextlib.suppress(OSError), atomic_path(self._path) as temporary:
                temporary.write_bytes(content)


class Engine:
    """A deserialized engine."""

    def __init__(
        self, trt: ModuleType, log: LogCollector, kind: str, path: Path, spec: GraphSpec, bundle: Bundle, own: EngineSet
    ) -> None:
        """Raises BackendError where TensorRT refuses what the manifest says fits, or it has other inputs or outputs."""
        self.kind, self.spec = kind, spec
        self._trt, self._log, self._bundle, self._own = trt, log, bundle, own
        self._calls: dict[tuple[tuple[str, int], ...], EngineCall] = {}
        self._runtime: Any = trt.Runtime(log.logger)
        log.clear()
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            again = f"{log.last_error()}; rebuild with {rebuild_command(bundle, own.flavour)}"
            raise BackendError(f"{FLAVOURS[own.flavour]} {trt.__version__} refuses {path}: {again}")
        self._kernels = RuntimeCache(own.graphs[kind].engine.sha256)
        self._check()

    def _check(self) -> None:
        engine = self._engine
        found = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            dtype = engine.get_tensor_dtype(name)
            found[name] = (is_input, _DTYPES.get(dtype.name, dtype.name))
        wanted = {t.name: (True, t.dtype) for t in self.spec.inputs}
        wanted |= {t.name: (False, t.dtype) for t in self.spec.outputs}
        if found != wanted:
            raise BackendError(f"the {self.kind} engine has tensors {found}, the graph has {wanted}")
        held, listed = engine.num_optimization_profiles, len(self._own.graphs[self.kind].profiles)
        if held != listed:
            raise BackendError(f"the {self.kind} engine has {held} profiles, the manifest lists {listed}")

    def call(self, sizes: Mapping[str, int], stream: int) -> EngineCall:
        """The context for a shape, made when it is first asked for.

        Raises:
            BackendError: no profile holds the shape, or TensorRT refuses it.
        """
        key = tuple(sorted(sizes.items()))
        if key not in self._calls:
            self._calls[key] = self._make(sizes, stream)
        return self._calls[key]

    @property
    def calls(self) -> list[EngineCall]:
        """Those that live."""
        return list(self._calls.values())

    def forget(self, call: EngineCall) -> None:
        """Destroys a context that nobody needs any more."""
        self._calls = {key: kept for key, kept in self._calls.items() if kept is not call}
        call.close()

    def save_kernels(self) -> None:
        """Keeps what TensorRT-RTX has compiled so far for the next process."""
        self._kernels.save()

    def _make(self, sizes: Mapping[str, int], stream: int) -> EngineCall:
        index = covering(self._own.graphs[self.kind].profiles, sizes)
        if index is None:
            raise uncovered(self._bundle, self._own, self.kind, sizes)
        self._log.clear()
        context = self._create_context()
        if context is None:
            raise NoContextError(f"the {self.kind} engine gives no execution context: {self._log.last_error()}")
        if not context.set_optimization_profile_async(index, stream):
            raise BackendError(f"the {self.kind} engine refuses profile {index}: {self._log.last_error()}")
        for tensor in self.spec.inputs:
            shape = tensor.shape(sizes)
            if not context.set_input_shape(tensor.name, shape):
                raise BackendError(f"the {self.kind} engine refuses {tensor.name} {shape}: {self._log.last_error()}")
        if missing := context.infer_shapes():
            raise BackendError(f"the {self.kind} engine lacks shapes of {', '.join(missing)}")
        for tensor in self.spec.outputs:
            found, wanted = tuple(context.get_tensor_shape(tensor.name)), tensor.shape(sizes)
            if found != wanted:
                raise BackendError(f"the {self.kind} engine gives {tensor.name} {found}, expected {wanted}")
        # 0 is what the library says on an error, too; the size of the whole profile is always enough.
        memory = int(context.update_device_memory_size_for_shapes())
        memory = memory or int(self._engine.get_device_memory_size_for_profile_v2(index))
        return EngineCall(self.kind, context, memory, self._log)

    def _create_context(self) -> Any:
        """A context whose activations we place. TensorRT-RTX takes its settings in one object."""
        trt, engine = self._trt, self._engine
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._own.flavour == "tensorrt":
            return engine.create_execution_context(managed)
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(managed)
        # Our graphs outlive the first runs: kernels must be the specialised ones when they are captured.
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self._kernels.attach(runtime_config)
        return engine.create_execution_context(runtime_config)

    def close(self) -> None:
        """Contexts first, then the engine, then its runtime: TensorRT wants them gone in this order."""
        self._kernels.save()
        for call in self._calls.values():
            call.close()
        self._calls.clear()
        self._engine = self._runtime = None
