"""A whole generation on the device: every AR step enqueued on one stream, and captured once it has run.

The loop of sampling/loop.py, without the host: known tokens are a prefix of the latents, which lie in the order in
which they are made; the device ranks the tokens and picks their reverse steps (graphs.ROW_GRAPHS). What can be known
beforehand is: positions, noise, tables (device_layout.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from ...errors import BackendError
from ...machine.cuda import Cuda, CudaError, PinnedBuffer
from ...models.architecture import Architecture
from ...sampling.chains import Floats, Integers
from ...sampling.job import GenerationJob, Observer, StepResult
from ...sampling.loop import not_finite
from ...sampling.plan import SamplingPlan
from ...sampling.shapes import step_shapes
from ..blocks import Block
from .device_layout import StepLayout, device_layout, ordered_to_grid
from .device_step import StepWork
from .engine import EngineCall


@dataclass
class Capture:
    """What a backend captures, shared by its programs.

    Attributes:
        mode: one of ``protocol.CUDA_GRAPH_MODES``.
        works: False once a capture has failed; then everything runs eagerly, after one warning.
    """

    mode: str
    works: bool = True

    def failed(self, reason: str) -> None:
        """Goes on without graphs."""
        self.works = False
        text = f"CUDA graph capture failed ({reason}); going on without CUDA graphs, which is slower"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


class EngineCalls(Protocol):
    """Where a program gets its contexts, with their activations placed."""

    name: str

    def call(self, kind: str, sizes: Mapping[str, int]) -> EngineCall: ...


class DeviceProgram:
    """One plan at one batch size: its buffers, and its captured graphs. Make and use it in one thread."""

    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        engines: EngineCalls,
        capture: Capture,
        plan: SamplingPlan,
        architecture: Architecture,
        batch: int,
    ) -> None:
        """Makes the contexts of every shape and allocates; BackendError where a profile or memory is missing."""
        self._cuda, self._stream, self._engines, self._capture = cuda, stream, engines, capture
        self.layout = device_layout(plan, architecture, batch)
        self._graphs: dict[int | None, int] = {}
        self._has_run = False
        self._addresses: list[int] = []
        self._buffers: list[PinnedBuffer] = []
        self._calls()
        try:
            self._inputs = self._allocated(self.layout.inputs_size)
            self._tables = self._allocated(self.layout.tables_size)
            self._work = self._allocated(self.layout.work_size)
            self._upload = self._page_locked(self.layout.inputs_size)
            self._latents = self._page_locked(self.layout.work["latents"].bytes)
            rows = self.layout.work.get("rows")
            self._rows = self._page_locked(rows.bytes) if rows else None
            self._upload_tables()
        except BaseException:
            self.close()
            raise

    def _allocated(self, size: int) -> int:
        address = self._cuda.allocate(size)
        self._addresses.append(address)
        return address

    def _page_locked(self, size: int) -> PinnedBuffer:
        buffer = self._cuda.allocate_pinned(size)
        self._buffers.append(buffer)
        return buffer

    def _upload_tables(self) -> None:
        size = self.layout.tables_size
        buffer = self._cuda.allocate_pinned(size)
        try:
            buffer.array[...] = 0
            self.layout.fill_tables(buffer.array)
            self._cuda.upload(self._tables, buffer.address, size, self._stream)
            self._cuda.synchronize(self._stream)
        finally:
            self._cuda.free_pinned(buffer)

    def run(self, job: GenerationJob, observer: Observer | None = None) -> Floats:
        """Latents [B, L, C] in grid order. With an observer, AR steps are separate graphs.

        Raises:
            BackendError: an engine fails, or gives values that are not finite.
        """
        self._load(job)
        stepwise = observer is not None or self._capture.mode == "step"
        for index in range(len(self.layout.steps)) if stepwise else (None,):
            self._play(index)
            if observer is not None and index is not None:
                self._show(self.layout.steps[index], job.orders, observer)
        ordered = self._downloaded()
        self._has_run = True
        self._check_finite(ordered)
        return ordered_to_grid(ordered, job.orders)

    def warm_up(self, job: GenerationJob) -> None:
        """Runs once, then captures what generations without an observer will replay."""
        self.run(job)
        for index in range(len(self.layout.steps)) if self._capture.mode == "step" else (None,):
            if index not in self._graphs:
                self._captured(index)

    def run_timed(self, job: GenerationJob, observer: Observer | None) -> tuple[Floats, dict[str, float]]:
        """Latents, and GPU seconds by kind of graph in an eager run; the gaps between calls count, too."""
        self._load(job)
        marks: list[tuple[str, int]] = []
        try:
            for layout in self.layout.steps:
                marks.append(("", self._mark()))
                StepWork(self, layout).enqueue(lambda part: marks.append((part, self._mark())))
                if observer is not None:
                    self._show(layout, job.orders, observer)
            ordered = self._downloaded()
            seconds = {"backbone": 0.0, "diffusion_step": 0.0}
            for (_, before), (part, after) in pairwise(marks):
                if part:
                    seconds[part] += self._cuda.elapsed(before, after)
        finally:
            for _, event in marks:
                self._cuda.destroy_event(event)
        self._check_finite(ordered)
        return ordered_to_grid(ordered, job.orders), seconds

    def _load(self, job: GenerationJob) -> None:
        """Everything that this generation needs from the host, in one upload."""
        self._cuda.synchronize(self._stream)  # a generation that failed may still be reading the buffer
        self.layout.fill_inputs(self._upload.array, job)
        self._cuda.upload(self._inputs, self._upload.address, self.layout.inputs_size, self._stream)

    def _mark(self) -> int:
        event = self._cuda.create_event()
        self._cuda.record(event, self._stream)
        return event

    def _play(self, index: int | None) -> None:
        """One AR step, or all (None): replayed, or recorded first, if every shape has run before; else eagerly."""
        executable = self._graphs.get(index) or self._captured(index)
        if executable:
            self._cuda.launch(executable, self._stream)
        else:
            self._enqueue(index)

    def _enqueue(self, index: int | None) -> None:
        for layout in self.layout.steps if index is None else (self.layout.steps[index],):
            StepWork(self, layout).enqueue()

    def _captured(self, index: int | None) -> int:
        """Records :meth:`_enqueue`; 0 if that is not wanted, too early, or fails."""
        if self._capture.mode == "off" or not self._capture.works or not self._has_run:
            return 0
        self._cuda.synchronize(self._stream)
        if not all(call.capturable(self._stream) for call in self._calls()):
            self._capture.failed("the library says that it cannot capture these engines")
            return 0
        failure: BackendError | None = None
        executable = 0
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self._enqueue(index)
            except BackendError as error:
                failure = error
            executable = self._cuda.end_capture(self._stream)
        except CudaError as error:
            failure = failure or error
        if failure is not None:
            self._cuda.destroy_graph(executable)
            self._capture.failed(str(failure))
            return 0
        self._graphs[index] = executable
        return executable

    def _calls(self) -> list[EngineCall]:
        """The contexts of every shape."""
        settings, batch = self.layout.plan.settings, self.layout.batch
        shapes = [shape for layout in self.layout.steps for shape in step_shapes(layout.step, settings, batch)]
        return [self._engines.call(kind, sizes) for kind, sizes, _ in shapes]

    def _downloaded(self) -> Floats:
        block = self.layout.work["latents"]
        self._cuda.download(self._latents.address, block.at(self._work), block.bytes, self._stream)
        self._cuda.synchronize(self._stream)
        return self._latents.array.view(block.dtype).reshape(block.shape).copy()

    def _show(self, layout: StepLayout, orders: Integers, observer: Observer) -> None:
        rows = self._downloaded_rows(layout) if layout.split.longer else None
        ordered = self._downloaded()
        done = layout.step.known + layout.step.predicted
        ordered[:, done:] = 0  # what an earlier generation left there
        self._check_finite(ordered)
        predict = orders[:, layout.step.known : done]
        observer(StepResult(layout.step, predict, self.layout.refined(layout, rows), ordered_to_grid(ordered, orders)))

    def _downloaded_rows(self, layout: StepLayout) -> Integers:
        assert self._rows is not None
        source = StepWork(self, layout).address("rows")
        count = self.layout.batch * layout.split.longer
        self._cuda.download(self._rows.address, source, count * 8, self._stream)
        self._cuda.synchronize(self._stream)
        return self._rows.array[: count * 8].view(np.int64).copy()

    def _check_finite(self, ordered: Floats) -> None:
        bad = ~np.isfinite(ordered).all(axis=(0, 2))
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            step = next(s.step.index for s in self.layout.steps if first < s.step.known + s.step.predicted)
            raise not_finite(step, len(self.layout.steps), self._engines.name)

    def forget_graphs(self) -> None:
        """Drops what was captured, and captures anew after the next run: contexts or activations have moved."""
        for executable in self._graphs.values():
            self._cuda.destroy_graph(executable)
        self._graphs.clear()
        self._has_run = False

    def close(self) -> None:
        """Frees everything; nothing of it may still be running."""
        self.forget_graphs()
        for address in self._addresses:
            self._cuda.free(address)
        for buffer in self._buffers:
            self._cuda.free_pinned(buffer)
        self._addresses, self._buffers = [], []

    def base_of(self, layout: StepLayout, name: str) -> tuple[Block, int]:
        """A block by name, of the AR step's inputs, its tables or the work area, and the address of its area."""
        for blocks, base in ((layout.inputs, self._inputs), (layout.tables, self._tables)):
            if name in blocks:
                return blocks[name], base
        if name in self.layout.conditioning:
            return self.layout.conditioning[name], self._inputs
        return self.layout.work[name], self._work

    def call(self, kind: str, sizes: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        """Enqueues one graph."""
        self._engines.call(kind, sizes).enqueue(addresses, self._stream)

    def copy_rows(self, destination: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Enqueues a copy with pitches, in bytes."""
        self._cuda.copy_rows(destination, pitch, source, source_pitch, width, rows, self._stream)
