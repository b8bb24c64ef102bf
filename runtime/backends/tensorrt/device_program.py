"""A whole generation on the device: every AR step enqueued on one stream, and captured once it has run.

The loop of sampling/loop.py, without the host: known tokens are a prefix of the latents, which lie in the order in
which they are made; the device ranks the tokens and picks their reverse steps (graphs.ROW_GRAPHS). What can be known
beforehand is: positions, noise, tables (device_layout.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import numpy as np

from ...errors import BackendError
from ...machine.cuda import Cuda, PinnedBuffer
from ...models.architecture import Architecture
from ...sampling.chains import Floats, Integers
from ...sampling.job import GenerationJob, Observer, StepResult
from ...sampling.loop import not_finite
from ...sampling.plan import SamplingPlan
from ...sampling.shapes import call_shapes
from ..blocks import Block
from .contexts import Contexts
from .device_layout import StepLayout, device_layout, ordered_to_grid
from .device_step import StepWork
from .engine import EngineCall

MOST_NODES = 100_000
"""Of all CUDA graphs of one program; at about 10 KB of GPU memory each (NVIDIA/cccl #3768) this is 1 GB."""


class DeviceProgram:
    """One plan at one batch size: its contexts, its buffers, its captured graphs. Make and use it in one thread.

    Where a generation cannot be captured in one piece, its AR steps are; where one of them cannot, it and all that come
    after it run eagerly.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        contexts: Contexts,
        cuda_graph: str,
        plan: SamplingPlan,
        architecture: Architecture,
        batch: int,
        backend: str,
    ) -> None:
        """Makes the contexts of every shape, the decoder's too, and allocates.

        Args:
            cuda_graph: one of ``protocol.CUDA_GRAPH_MODES``.
            backend: its name, for errors.

        Raises:
            BackendError: a profile or memory is missing.
        """
        self._cuda, self._stream, self._contexts, self._backend = cuda, stream, contexts, backend
        # What is captured in one piece: a generation, a step, or (off) nothing more.
        self._wanted = self._mode = "generation" if cuda_graph == "auto" else cuda_graph
        self.layout = device_layout(plan, architecture, batch)
        self._graphs: dict[int | None, int] = {}
        self._nodes = 0
        self._has_run = False
        self._addresses: list[int] = []
        self._buffers: list[PinnedBuffer] = []
        shapes = [(kind, sizes) for kind, each in call_shapes(plan, batch).items() for sizes in each]
        self._calls: dict[tuple[str, frozenset[tuple[str, int]]], EngineCall] = {}
        for (kind, sizes), call in zip(shapes, contexts.take(shapes), strict=True):
            self._calls[kind, frozenset(sizes.items())] = call
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
        for index in self._pieces(observer is not None):
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
        mode = ""
        while mode != self._mode:  # where capturing fails it falls back
            mode = self._mode
            for index in self._pieces():
                if index not in self._graphs:
                    self._captured(index)

    def _pieces(self, watched: bool = False) -> Iterable[int | None]:
        """What is played in one piece each: AR steps, or all of them (None)."""
        some_steps = self._mode == "off" and self._graphs and None not in self._graphs
        return range(len(self.layout.steps)) if watched or self._mode == "step" or some_steps else (None,)

    def run_timed(self, job: GenerationJob, observer: Observer | None) -> tuple[Floats, dict[str, float]]:
        """Latents, and GPU seconds by kind of graph: backbone and head are replayed one after the other, from graphs
        made for this run, where generations are replayed; else the gaps between calls count, too."""
        parts = [
            (layout, kind, enqueue) for layout in self.layout.steps for kind, enqueue in StepWork(self, layout).parts()
        ]
        graphs: list[int] = []
        marks: list[int] = []
        seconds = {kind: 0.0 for _, kind, _ in parts}
        try:
            if self._graphs:
                graphs = [self._cuda.capture(self._stream, enqueue)[0] for _, _, enqueue in parts]
            self._load(job)
            for index, (layout, kind, enqueue) in enumerate(parts):
                marks.append(self._mark())
                if graphs:
                    self._cuda.launch(graphs[index], self._stream)
                else:
                    enqueue()
                marks.append(self._mark())
                if observer is not None and kind == "diffusion_step":
                    self._show(layout, job.orders, observer)
            ordered = self._downloaded()
            for (_, kind, _), before, after in zip(parts, marks[::2], marks[1::2], strict=True):
                seconds[kind] += self._cuda.elapsed(before, after)
        finally:
            for event in marks:
                self._cuda.destroy_event(event)
            for executable in graphs:
                self._cuda.destroy_graph(executable)
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
        if self._mode == "off" or not self._has_run:
            return 0
        self._cuda.synchronize(self._stream)
        if not all(call.capturable(self._stream) for call in self._calls.values() if call.kind != "decoder"):
            self._fall_back("off", "the library says that it cannot capture these engines")
            return 0
        try:
            left = MOST_NODES - self._nodes
            executable, nodes = self._cuda.capture(self._stream, lambda: self._enqueue(index), left)
        except BackendError as error:
            self._fall_back("step" if index is None else "off", str(error))
            return 0
        self._graphs[index] = executable
        self._nodes += nodes
        return executable

    def _fall_back(self, mode: str, reason: str) -> None:
        self._mode = mode
        instead = "AR steps are captured one by one" if mode == "step" else "no more CUDA graphs, which is slower"
        warnings.warn(f"CUDA graph capture failed ({reason}); from now on {instead}", RuntimeWarning, stacklevel=2)

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
            raise not_finite(step, len(self.layout.steps), self._backend)

    def forget_graphs(self) -> None:
        """Drops what was captured, and captures anew after the next run: contexts or activations have moved."""
        for executable in self._graphs.values():
            self._cuda.destroy_graph(executable)
        self._graphs.clear()
        self._mode, self._nodes, self._has_run = self._wanted, 0, False

    def close(self) -> None:
        """Frees everything; nothing of it may still be running."""
        self.forget_graphs()
        for address in self._addresses:
            self._cuda.free(address)
        for buffer in self._buffers:
            self._cuda.free_pinned(buffer)
        self._contexts.give_back(self._calls.values())
        self._addresses, self._buffers, self._calls = [], [], {}

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
        self._calls[kind, frozenset(sizes.items())].enqueue(addresses, self._stream)

    def copy_rows(self, destination: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Enqueues a copy with pitches, in bytes."""
        self._cuda.copy_rows(destination, pitch, source, source_pitch, width, rows, self._stream)
