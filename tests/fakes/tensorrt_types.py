"""The value types of the fake TensorRT, with the real names and numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import numpy as np


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class DataType(Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int64)": (DataType.INT64, np.int64),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(int8)": (DataType.INT8, np.int8),
    "tensor(uint8)": (DataType.UINT8, np.uint8),
    "tensor(bool)": (DataType.BOOL, np.bool_),
}


def nptype(kind: DataType) -> type:
    return {each: scalar for each, scalar in TYPES.values()}[kind]


class Dims:
    """Like the real one: equal to a tuple, but neither a tuple nor hashable."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, shape: Sequence[int] = ()) -> None:
        self._shape = tuple(int(each) for each in shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: Any) -> Any:
        return self._shape[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._shape)

    def __eq__(self, other: object) -> bool:
        return self._shape == tuple(other)  # pyright: ignore[reportArgumentType]

    def __repr__(self) -> str:
        return repr(self._shape)


class ILogger:
    """To be subclassed; a subclass must call ``__init__``, as pybind11 insists."""

    _first: Any = None
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None:
        self._ready = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError("log() must be overridden")


def registered(logger: ILogger) -> ILogger:
    """The library's one logger of the process: the first that lives. Others are ignored, with a word to that one."""
    first = logger._first() if logger._first is not None else None
    if first is None:
        base = next(each for each in type(logger).__mro__ if "_first" in vars(each))
        base._first = weakref.ref(logger)
        return logger
    if first is not logger:
        first.log(Severity.WARNING, "The logger passed differs from one already registered; it is ignored")
    return first


class IRuntimeCache:
    """Compiled kernels: here, how many contexts were made with it, now and in stored runs."""

    def __init__(self) -> None:
        self.contexts = 0

    def serialize(self) -> bytes:
        return b"kernels %d" % self.contexts

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels "):
            return False
        self.contexts = int(blob.split()[1])
        return True


class IRuntimeConfig:
    """TensorRT-RTX's settings of a context."""

    def __init__(self) -> None:
        self._cache: IRuntimeCache | None = None
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._graphs = CudaGraphStrategy.DISABLED
        self._kernels = DynamicShapesKernelSpecializationStrategy.LAZY

    @property
    def cuda_graph_strategy(self) -> CudaGraphStrategy:
        return self._graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, strategy: CudaGraphStrategy) -> None:
        self._graphs = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        cache.contexts += 1
        return True

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    @property
    def dynamic_shapes_kernel_specialization_strategy(self) -> DynamicShapesKernelSpecializationStrategy:
        return self._kernels

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(
        self, strategy: DynamicShapesKernelSpecializationStrategy
    ) -> None:
        self._kernels = strategy


class Builder:
    """There, because its absence means a broken installation; builds nothing."""

    def __init__(self, logger: ILogger) -> None:
        raise NotImplementedError("the fake builds no engines; see fake_engine_bytes")
