"""TensorRT and TensorRT-RTX backend: whole generations on the GPU, one upload before and one download after.

Which engines run is decided from the manifest (engines.py); every context shares one arena of activations, since the
graphs never run at the same time; programs (device_program.py) are kept per plan and batch size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.engine_sets import FLAVOURS, EngineSet, choose_engines
from ...bundle.reader import Bundle
from ...errors import BackendError
from ...machine.cuda import Cuda
from ...machine.examine import Machine, examine_machine
from ...models.families import graph_specs
from ...sampling.chains import Floats
from ...sampling.job import GenerationJob, Observer, generation_job
from ...sampling.noise import SeededNoise
from ...sampling.plan import SamplingPlan
from ..blocks import padded
from ..protocol import CallHook, GraphCall, hooked
from .device_program import Capture, DeviceProgram
from .engine import Engine, EngineCall
from .library import LogCollector, load_library

KEPT_PROGRAMS = 4
"""Plans and batch sizes whose buffers and CUDA graphs stay on the GPU; the least recently used one goes first."""


def open_tensorrt(
    bundle: Bundle,
    flavour: str,
    device: int = 0,
    cuda_graph: str = "auto",
    checksums: bool = True,
    machine: Machine | None = None,
) -> TensorRTBackend:
    """Opens the bundle's newest engines of one of :data:`FLAVOURS` that run on ``machine``, this one if None.

    Args:
        device: index of the GPU.
        cuda_graph: one of ``CUDA_GRAPH_MODES``.
        checksums: compare every engine's SHA-256 with the manifest.

    Raises:
        BackendError: no engines fit this machine; or library, driver or memory fail.
        BundleError: an engine file is not what the manifest says.
    """
    engines = choose_engines(bundle, machine or examine_machine(), flavour)
    return TensorRTBackend(bundle, engines, device, cuda_graph, checksums)


class TensorRTBackend:
    """Engines of one bundle on one GPU. Use it from the thread that made it; ``close`` gives the GPU's memory back."""

    hook: CallHook | None = None
    whole_generations = True

    def __init__(
        self, bundle: Bundle, engines: EngineSet, device: int = 0, cuda_graph: str = "auto", checksums: bool = True
    ) -> None:
        """See :func:`open_tensorrt`."""
        self.name = engines.flavour
        self._bundle, self._architecture = bundle, bundle.architecture
        self._programs: OrderedDict[tuple[Any, int], DeviceProgram] = OrderedDict()
        self._engines: dict[str, Engine] = {}
        self._arena, self._arena_size, self._stream = 0, 0, 0
        self._placed: dict[int, int] = {}
        trt = load_library(engines.flavour)
        self._cuda = Cuda(device)
        library = f"{FLAVOURS[engines.flavour]} {trt.__version__}"
        self._description = f"{library}, {engines.precision}, {self._cuda.device.name}"
        self._log = LogCollector(trt)
        self._capture = Capture(cuda_graph)
        specs = graph_specs(bundle.architecture, engines.max_batch)
        paths = bundle.engine_paths(engines, checksums)
        try:
            self._stream = self._cuda.create_stream()
            for kind, path in paths.items():
                self._engines[kind] = Engine(trt, self._log, kind, path, specs[kind], bundle, engines)
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> str:
        return self._description

    def call(self, kind: str, sizes: Mapping[str, int]) -> EngineCall:
        """The context for a shape, its activations placed in the arena."""
        call = self._engines[kind].call(sizes, self._stream)
        if call.memory > self._arena_size or not self._arena:
            self._grow_arena(max(call.memory, 1))
        if self._placed.get(id(call)) != self._arena:
            call.set_memory(self._arena, self._arena_size)
            self._placed[id(call)] = self._arena
        return call

    def _grow_arena(self, size: int) -> None:
        """A larger arena; graphs that were captured on the old one are dropped."""
        self._cuda.synchronize(self._stream)
        for program in self._programs.values():
            program.forget_graphs()
        self._cuda.free(self._arena)
        self._arena, self._arena_size = 0, 0
        self._placed.clear()
        self._arena = self._cuda.allocate(padded(size))
        self._arena_size = padded(size)

    def generate(self, job: GenerationJob, observer: Observer | None = None) -> Floats:
        program = self._program(job.plan, len(job.orders))
        if self.hook is None:
            return program.run(job, observer)
        latents, seconds = program.run_timed(job, observer)
        for kind, spent in seconds.items():
            self.hook(GraphCall(kind, {}, (), spent))
        return latents

    def warm_up(self, plan: SamplingPlan, batch: int) -> None:
        """Makes the contexts of every shape, runs each once and captures; the next generation only replays."""
        seeds = list(range(batch))
        conditioner = self._bundle.conditioner
        noise = SeededNoise(seeds, self._architecture.token_channels)
        asked = conditioner.arrays(conditioner.samples(batch))
        self._program(plan, batch).warm_up(generation_job(plan, self._architecture, asked, seeds, noise))

    def _program(self, plan: SamplingPlan, batch: int) -> DeviceProgram:
        key = (replace(plan.settings, name=""), batch)
        program = self._programs.pop(key, None)
        if program is None:
            while len(self._programs) >= KEPT_PROGRAMS:
                self._cuda.synchronize(self._stream)
                self._programs.popitem(last=False)[1].close()
            program = DeviceProgram(self._cuda, self._stream, self, self._capture, plan, self._architecture, batch)
        self._programs[key] = program
        return program

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        return self.run("decoder", {"latents": latents})[0]

    def run(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One graph call with plain arrays, uploaded and downloaded; for decoding and for verification."""
        return hooked(self.hook, kind, inputs, lambda: self._run(kind, inputs))

    def _run(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        if kind not in self._engines:
            raise BackendError(f"this bundle has no {kind} engine")
        spec = self._engines[kind].spec
        arrays = {t.name: np.ascontiguousarray(inputs[t.name], dtype=t.dtype) for t in spec.inputs}
        shapes = [zip(tensor.axes, arrays[tensor.name].shape, strict=True) for tensor in spec.inputs]
        sizes = {axis: size for shape in shapes for axis, size in shape if isinstance(axis, str)}
        outputs = {t.name: np.empty(t.shape(sizes), dtype=t.dtype) for t in spec.outputs}
        call = self.call(kind, sizes)
        addresses: dict[str, int] = {}
        try:
            for name, array in (*arrays.items(), *outputs.items()):
                addresses[name] = self._cuda.allocate(array.nbytes)
            for name, array in arrays.items():
                self._cuda.upload(addresses[name], array.ctypes.data, array.nbytes, self._stream)
            call.enqueue(addresses, self._stream)
            for name, array in outputs.items():
                self._cuda.download(array.ctypes.data, addresses[name], array.nbytes, self._stream)
        finally:
            try:  # waits first, so that nothing is freed under a running call
                self._cuda.synchronize(self._stream)
            finally:
                for address in addresses.values():
                    self._cuda.free(address)
        return list(outputs.values())

    def close(self) -> None:
        """Gives everything back, in the order that TensorRT and CUDA want. Nothing works after this."""
        steps: list[Callable[[], None]] = []
        if self._stream:
            steps.append(lambda: self._cuda.synchronize(self._stream))
        steps += [program.close for program in self._programs.values()]
        steps += [engine.close for engine in self._engines.values()]
        steps.append(lambda: self._cuda.free(self._arena))
        steps.append(lambda: self._cuda.destroy_stream(self._stream))
        failure: BackendError | None = None
        for step in steps:
            try:
                step()
            except BackendError as error:  # a GPU that has failed fails here too; what can be freed still is
                failure = failure or error
        self._programs.clear()
        self._engines.clear()
        self._placed.clear()
        self._arena, self._arena_size, self._stream = 0, 0, 0
        if failure is not None:
            raise failure
