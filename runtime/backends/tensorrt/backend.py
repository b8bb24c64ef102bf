"""TensorRT and TensorRT-RTX backend: whole generations on the GPU, one upload before and one download after.

Which engines run is decided from the manifest; every context shares one arena of activations (contexts.py); programs
(device_program.py) are kept per plan and batch size.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...bundle.engine_sets import FLAVOURS, EngineSet, choose_engines
from ...bundle.reader import Bundle
from ...errors import BackendError
from ...machine.cuda import Cuda, CudaError
from ...machine.examine import Machine, examine_machine
from ...models.families import graph_specs
from ...sampling.chains import Floats
from ...sampling.job import GenerationJob, Observer, generation_job
from ...sampling.noise import SeededNoise
from ...sampling.plan import SamplingPlan
from ..protocol import CallHook, GraphCall, hooked
from .contexts import Contexts
from .device_program import DeviceProgram
from .engine import Engine, NoContextError
from .library import library_log, load_library
from .single_call import SingleCall

Made = TypeVar("Made")

KEPT_PROGRAMS = 4
"""Plans and batch sizes whose buffers and CUDA graphs stay on the GPU; the least recently used one goes first."""

KEPT_CALLS = 4
"""Graphs and shapes that were called alone, such as the decoder at one batch size, whose buffers stay."""


def open_tensorrt(
    bundle: Bundle,
    flavour: str,
    device: int = 0,
    cuda_graph: str = "auto",
    checksums: bool = True,
    machine: Machine | None = None,
) -> TensorRTBackend:
    """Opens the bundle's newest engines of one of :data:`FLAVOURS` that run on ``machine``; None: this one, with the
    GPU ``device``.

    Args:
        device: index of the GPU.
        cuda_graph: one of ``CUDA_GRAPH_MODES``.
        checksums: compare every engine's SHA-256 with the manifest.

    Raises:
        BackendError: no engines fit this machine; or library, driver or memory fail.
        BundleError: an engine file is not what the manifest says.
    """
    engines = choose_engines(bundle, machine or examine_machine(device), flavour)
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
        self._single: OrderedDict[tuple[str, tuple[tuple[str, int], ...]], SingleCall] = OrderedDict()
        trt = load_library(engines.flavour)
        self._cuda = Cuda(device)
        library = f"{FLAVOURS[engines.flavour]} {trt.__version__}"
        self._description = f"{library}, {engines.precision}, {self._cuda.device.name}"
        self._cuda_graph = cuda_graph
        specs = graph_specs(bundle.architecture, engines.max_batch)
        paths = bundle.engine_paths(engines, checksums)
        self._stream = self._cuda.create_stream()
        self._contexts = Contexts(self._cuda, self._stream, self._forget_graphs)
        try:
            for kind, path in paths.items():
                engine = Engine(trt, library_log(trt), kind, path, specs[kind], bundle, engines)
                self._contexts.engines[kind] = engine
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> str:
        return self._description

    def _forget_graphs(self) -> None:
        for program in self._programs.values():
            program.forget_graphs()

    def _made(self, make: Callable[[], Made]) -> Made:
        """Once more where the GPU is full, with everything dropped that can be made again."""
        with contextlib.suppress(CudaError, NoContextError):
            return make()
        self._cuda.synchronize(self._stream)
        for kept in (self._programs, self._single):
            while kept:
                kept.popitem()[1].close()
        return make()

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
        for engine in self._contexts.engines.values():
            engine.save_kernels()

    def _program(self, plan: SamplingPlan, batch: int) -> DeviceProgram:
        key = (replace(plan.settings, name=""), batch)
        program = self._programs.pop(key, None)
        if program is None:
            while len(self._programs) >= KEPT_PROGRAMS:
                self._cuda.synchronize(self._stream)
                self._programs.popitem(last=False)[1].close()
            own = self._cuda, self._stream, self._contexts
            about = self._cuda_graph, plan, self._architecture, batch, self.name
            program = self._made(lambda: DeviceProgram(*own, *about))
        self._programs[key] = program
        return program

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        return self.run("decoder", {"latents": latents})[0]

    def run(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One graph call with plain arrays, uploaded and downloaded; for decoding and for verification."""
        return hooked(self.hook, kind, inputs, lambda: self._run(kind, inputs))

    def _run(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        if kind not in self._contexts.engines:
            raise BackendError(f"this bundle has no {kind} engine")
        spec = self._contexts.engines[kind].spec
        shapes = [zip(tensor.axes, inputs[tensor.name].shape, strict=True) for tensor in spec.inputs]
        sizes = {axis: size for shape in shapes for axis, size in shape if isinstance(axis, str)}
        key = (kind, tuple(sizes.items()))
        call = self._single.pop(key, None)
        if call is None:
            while len(self._single) >= KEPT_CALLS:
                self._cuda.synchronize(self._stream)
                self._single.popitem(last=False)[1].close()
            call = self._made(lambda: SingleCall(self._cuda, self._stream, self._contexts, kind, spec, sizes))
        self._single[key] = call
        return call(inputs)

    def close(self) -> None:
        """Gives everything back, in the order that TensorRT and CUDA want. Nothing works after this."""
        engines = list(self._contexts.engines.values())
        steps: list[Callable[[], None]] = []
        if self._stream:
            steps.append(lambda: self._cuda.synchronize(self._stream))
        steps += [each.close for each in (*self._programs.values(), *self._single.values(), *engines)]
        steps.append(self._contexts.free)
        steps.append(lambda: self._cuda.destroy_stream(self._stream))
        failure: BackendError | None = None
        for step in steps:
            try:
                step()
            except BackendError as error:  # a GPU that has failed fails here too; what can be freed still is
                failure = failure or error
        for kept in (self._programs, self._single, self._contexts.engines):
            kept.clear()
        self._stream = 0
        if failure is not None:
            raise failure
