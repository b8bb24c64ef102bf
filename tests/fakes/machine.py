"""The machine behind the fakes of CUDA and TensorRT: an address sanitiser and a race detector.

Device memory is host memory at real addresses. Stream work is queued and runs only when something waits for it, so
that a forgotten synchronisation shows as stale data; fresh memory holds 0xFF bytes (NaN, -1). Every range is checked
when the work runs; a wrong one is cudaErrorIllegalAddress at that synchronisation and ever after, as on a GPU.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEXTS = {
    "cudaSuccess": (0, "no error"),
    "cudaErrorInvalidValue": (1, "invalid argument"),
    "cudaErrorMemoryAllocation": (2, "out of memory"),
    "cudaErrorInvalidPitchValue": (12, "invalid pitch argument"),
    "cudaErrorInsufficientDriver": (35, "CUDA driver version is insufficient for CUDA runtime version"),
    "cudaErrorNoDevice": (100, "no CUDA-capable device is detected"),
    "cudaErrorInvalidDevice": (101, "invalid device ordinal"),
    "cudaErrorInvalidResourceHandle": (400, "invalid resource handle"),
    "cudaErrorNotReady": (600, "device not ready"),
    "cudaErrorIllegalAddress": (700, "an illegal memory access was encountered"),
    "cudaErrorStreamCaptureUnsupported": (900, "operation not permitted when stream is capturing"),
    "cudaErrorStreamCaptureInvalidated": (901, "operation failed due to a previous error during capture"),
    "cudaErrorCapturedEvent": (907, "operation not permitted on an event last recorded in a capturing stream"),
}
Error: Any = IntEnum("cudaError_t", {name: number for name, (number, _) in TEXTS.items()})
OK = Error.cudaSuccess

Range = tuple[str, int, int]
"""Space (``device`` or ``pinned``), address, bytes."""


@dataclass
class FakeDevice:
    """One GPU. ``memory`` is what allocations may add up to."""

    name: str = "Fake H100"
    compute_capability: str = "9.0"
    memory: int = 1 << 30


@dataclass
class Allocation:
    """A live piece of memory."""

    space: str
    address: int
    size: int
    storage: NDArray[np.uint8] = field(repr=False)


@dataclass
class Work:
    """Something queued on a stream. ``alive`` says why it must not run any more, or None."""

    name: str
    run: Callable[[], None]
    reads: tuple[Range, ...] = ()
    writes: tuple[Range, ...] = ()
    alive: Callable[[], str | None] = lambda: None


@dataclass
class Stream:
    """Queue, and the recording while it captures."""

    queue: deque[Work] = field(default_factory=deque)
    recording: list[Work] | None = None
    invalid: bool = False
    thread: int = 0


@dataclass
class Graph:
    """A recording."""

    works: list[Work]


@dataclass
class GraphExec(Graph):
    """An executable recording; its first launch is slow unless it was uploaded."""

    uploaded: bool = False


@dataclass
class Event:
    """When it happened; ``pending`` is its place in a queue."""

    at: float | None = None
    pending: Work | None = None
    stream: int = 0
    captured: bool = False


@dataclass
class FakeMachine:
    """All state behind the fakes of one test.

    Attributes:
        driver_version, runtime_version: as CUDA numbers them; driver 0 means that there is none.
        live: allocations by address; ``leaks()`` also lists streams, events and graphs.
        counts: how often what happened, in ``launches``, of which ``cold_launches`` of graphs that were not uploaded,
            ``captures``, ``enqueues``, ``pageable_copies``, and in bytes ``uploaded``, ``downloaded``, ``copied``.
        log: every CUDA and TensorRT call, in order: its name, then its arguments.
        faults: what a GPU would have suffered in silence (illegal addresses, double frees), in words.
        races: work queued on one stream that touches what unfinished work on another stream uses.
        fail_capture: the next captures come out invalidated.
        fail_next: name of a function to the error that its next call returns.
        fail_enqueue_after: the n-th TensorRT enqueue returns False.
        fail_sizes: TensorRT answers 0 when it is asked for a context's activations, as it does on an error.
        on_enqueue: called at every TensorRT enqueue; what it raises comes out there.
        contexts: TensorRT's contexts that live; each takes ``context_bytes`` of the GPU besides its activations, and
            each node of an executable graph ``node_bytes``.
        alignment: bytes that tensor addresses must be multiples of.
    """

    devices: list[FakeDevice] = field(default_factory=lambda: [FakeDevice()])
    driver_version: int = 13000
    runtime_version: int = 13050
    live: dict[int, Allocation] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    races: list[str] = field(default_factory=list)
    fail_capture: bool = False
    fail_next: dict[str, Any] = field(default_factory=dict)
    fail_enqueue_after: int | None = None
    fail_sizes: bool = False
    on_enqueue: Callable[[], None] = lambda: None
    contexts: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    context_bytes: int = 1 << 16
    node_bytes: int = 10_000
    alignment: int = 256
    device: int = 0
    broken: Any = OK
    handles: dict[int, Any] = field(default_factory=lambda: {0: Stream()})
    freed: deque[Allocation] = field(default_factory=lambda: deque(maxlen=256))

    def calls(self) -> list[str]:
        """The log without arguments."""
        return [line.split()[0] for line in self.log]

    def leaks(self) -> list[str]:
        """Everything that nobody gave back."""
        memory = [f"{each.space} memory, {each.size} bytes" for each in self.live.values()]
        return memory + [type(each).__name__ for handle, each in self.handles.items() if handle]

    def allocate(self, space: str, size: int) -> int:
        """Address of poisoned memory, aligned to 256 bytes; 0 when the device is full."""
        if space == "device" and size > self.free_bytes():
            return 0
        storage = np.full(size + 256, 0xFF, np.uint8)
        address = -(-storage.ctypes.data // 256) * 256
        self.live[address] = Allocation(space, address, size, storage)
        return address

    def release(self, space: str, address: int) -> bool:
        """False, and a fault, when no such allocation lives. Freed addresses are not reused soon, so misuse shows."""
        found = self.live.get(address)
        if found is None or found.space != space:
            self.faults.append(f"freeing {address:#x}, which is no live {space} allocation")
            return False
        self.freed.append(self.live.pop(address))
        return True

    def free_bytes(self) -> int:
        used = sum(each.size for each in self.live.values() if each.space == "device")
        used += len(self.contexts) * self.context_bytes
        used += sum(len(each.works) for each in self.handles.values() if isinstance(each, GraphExec)) * self.node_bytes
        return self.devices[self.device].memory - used

    def space_of(self, address: int) -> str:
        """``device`` or ``pinned`` for memory of the fake, living or freed; else ``pageable``."""
        for each in (*self.live.values(), *self.freed):
            if each.address <= address < each.address + each.size:
                return each.space
        return "pageable"

    def inside(self, reach: Range) -> bool:
        """Whether a range lies within one live allocation of its space."""
        space, address, size = reach
        return any(
            each.space == space and each.address <= address and address + size <= each.address + each.size
            for each in self.live.values()
        )

    def handle(self, thing: Any) -> int:
        number = 0x1000 + 16 * self.counts["handles"]
        self.counts["handles"] += 1
        self.handles[number] = thing
        return number

    def capturing(self, stream: int) -> bool:
        return self.handles[stream].recording is not None

    def invalidate(self, stream: int) -> None:
        """What CUDA does to a capture in which something forbidden happens."""
        self.handles[stream].invalid = True

    def forbidden(self) -> bool:
        """Whether this thread captures, where CUDA allows no allocation; invalidates the capture if so."""
        mine = [
            each
            for each in self.handles.values()
            if isinstance(each, Stream) and each.recording is not None and each.thread == threading.get_ident()
        ]
        for each in mine:
            each.invalid = True
        return bool(mine)

    def enqueue(self, stream: int, work: Work) -> None:
        """Queues work, or records it where the stream captures."""
        target = self.handles[stream]
        if target.recording is not None:
            target.recording.append(work)
            return
        for number, other in self.handles.items():
            if isinstance(other, Stream) and other is not target:
                for earlier in other.queue:
                    clash = _touch(work.writes, earlier.reads + earlier.writes) or _touch(work.reads, earlier.writes)
                    if clash:
                        self.races.append(f"{work.name} on {stream} races {earlier.name} on {number}")
        target.queue.append(work)

    def drain(self, stream: int, until: Work | None = None) -> Any:
        """Runs a stream's work, up to and including ``until``; the sticky error of it."""
        queue = self.handles[stream].queue
        while queue:
            work = queue.popleft()
            if self.broken == OK:
                wrong = [reach for reach in work.reads + work.writes if reach[2] and not self.inside(reach)]
                reason = work.alive() or (wrong and f"{wrong[0][0]} {wrong[0][1]:#x} + {wrong[0][2]} is not allocated")
                if reason:
                    self.faults.append(f"{work.name}: {reason}")
                    self.broken = Error.cudaErrorIllegalAddress
                else:
                    work.run()
            if work is until:
                break
        return self.broken


def _touch(some: tuple[Range, ...], others: tuple[Range, ...]) -> bool:
    return any(a < d + m and d < a + n for _, a, n in some for _, d, m in others)
