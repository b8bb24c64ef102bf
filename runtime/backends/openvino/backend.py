"""OpenVINO backend: runs a bundle's graphs on CPUs, bfloat16 ones too, in the precision that the bundle has.

What OpenVINO computes in is settled by a hint, whose default on CPUs with bfloat16 is bfloat16, whatever the graph
says. So the hint is always given here, and read back: float32, but for the network of a bfloat16 graph.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.graph_file import GraphFile
from ...bundle.links import plain_files
from ...errors import BackendError
from ...machine.examine import INSTALL
from ...machine.openvino import cpu_capabilities, import_openvino
from ...sampling.chains import DiffusionChain, Floats
from ...sampling.loop import BackboneOutput, check_shape
from ..host_loop import HostLoopBackend, modulations
from ..protocol import hooked
from .library import read_onnx, reason
from .split import Part, has_bfloat16, split, whole

_TYPES = {"float32": "f32", "uint8": "u8", "int64": "i64"}


class OpenVinoBackend(HostLoopBackend):
    """Compiled models for a bundle's graphs. Calls from several threads take turns."""

    name = "openvino"

    def __init__(
        self, graphs: Mapping[str, Path | GraphFile], threads: int | None = None, *, cut: bool | None = None
    ) -> None:
        """Compiles each graph, for all shapes.

        Args:
            graphs: graph kind to a bundle's graph, or to an ONNX file of our own making.
            threads: of one call; OpenVINO's default (physical cores) if None.
            cut: compile the networks of bfloat16 graphs with the bfloat16 hint, and what is around them in float32
                (split.py); if False, all in float32. By default where the CPU has bfloat16; others compute in float32.

        Raises:
            BackendError: OpenVINO is missing, or refuses a graph.
        """
        try:
            openvino = import_openvino()
        except ImportError as error:
            raise BackendError(f"OpenVINO cannot be imported: {reason(error)}; {INSTALL['openvino']}") from None
        capable = "BF16" in cpu_capabilities(openvino)
        cut = capable if cut is None else cut
        self._lock, self._process = threading.RLock(), os.getpid()
        self._programs: dict[str, Program] = {}
        self._description = "openvino cpu"
        core = openvino.Core()
        for kind, graph in graphs.items():
            with plain_files(graph) if isinstance(graph, GraphFile) else nullcontext(graph) as plain:
                path = plain.path if isinstance(plain, GraphFile) else plain
                model = read_onnx(openvino, path)
                if isinstance(plain, GraphFile):
                    _check_types(model, plain)
                low = has_bfloat16(openvino, model)
                if low:
                    kept = "bfloat16" if capable and cut else "bfloat16 graphs in float32"
                    self._description = f"openvino cpu, {kept}"
                parts = split(openvino, model, kind) if low and cut else (whole(model),)
                try:
                    self._programs[kind] = Program(openvino, core, parts, threads)
                except BackendError:
                    raise
                except Exception as error:  # OpenVINO's own exceptions share no base class
                    raise BackendError(f"OpenVINO cannot compile {path}: {reason(error)}") from error
                if isinstance(plain, GraphFile):
                    plain.confirm()

    @property
    def description(self) -> str:
        return self._description

    def run_graph(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        with self._program(kind) as program:
            for name, value in inputs.items():
                program.bind(name, value)
            return [value.copy() for value in program.infer()]

    @contextlib.contextmanager
    def _program(self, kind: str) -> Iterator[Program]:
        """A graph for this thread alone, with one-line errors."""
        if kind not in self._programs:
            raise BackendError(f"this bundle has no {kind} graph")
        if os.getpid() != self._process:
            raise BackendError("OpenVINO does not survive a fork of the process; load the bundle in the child")
        with self._lock:
            self.calling = kind, time.monotonic()
            try:
                yield self._programs[kind]
            except BackendError:
                raise
            except Exception as error:
                raise BackendError(f"OpenVINO failed in the {kind} graph: {reason(error)}") from error
            finally:
                self.calling = None

    def denoise(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        branches, batch, predicted, width = z.shape
        sorted_z = z.value.reshape(branches, batch * predicted, width)[:, chain.rows]
        x = chain.x.copy()
        with self._program("modulation") as conditions, self._program("diffusion_step") as step:

            def modulate(inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
                self.calling = "modulation", time.monotonic()
                given = {name: conditions.bind(name, value) for name, value in inputs.items()}
                return hooked(self.hook, "modulation", given, conditions.infer)

            for segment in chain.segments:
                n = segment.rows
                # Bound once: each reverse step writes its own values into the same memory.
                bound = {
                    "guidance": step.bind("guidance", chain.guidance[:n]),
                    "x": step.bind("x", x[:n].copy()),
                    "coefficients": step.bind("coefficients", segment.coefficients[0].copy()),
                    "noise": step.bind("noise", segment.noise[0].copy()),
                }
                for index, modulation in enumerate(modulations(sorted_z[:, :n], segment.timesteps, modulate)):
                    bound["modulation"] = step.bind("modulation", modulation)
                    bound["coefficients"][...] = segment.coefficients[index]
                    bound["noise"][...] = segment.noise[index]
                    self.calling = "diffusion_step", time.monotonic()
                    x_next = hooked(self.hook, "diffusion_step", bound, step.infer)[0]
                    check_shape("diffusion_step", x_next.shape, bound["x"].shape)
                    bound["x"][...] = x_next
                x[:n] = bound["x"]
        return x


class Program:
    """The compiled parts of one graph, with one request each; values pass between them without copies."""

    def __init__(self, openvino: Any, core: Any, parts: tuple[Part, ...], threads: int | None) -> None:
        """Raises BackendError where OpenVINO would compute in another precision."""
        self._openvino = openvino
        self._parts = parts
        self._requests: list[Any] = []
        self._arrays: dict[str, NDArray[Any]] = {}
        self._names = {name for part in parts for name in part.inputs} - {n for part in parts for n in part.outputs}
        for part in parts:
            types = openvino.Type
            hint = types.bf16 if part.lowered else types.f32
            compiled = core.compile_model(part.model, "CPU", _settings(hint, threads))
            found = compiled.get_property("INFERENCE_PRECISION_HINT")
            # A CPU without bfloat16 computes in float32 instead, which is never less than what was asked for.
            if found not in (hint, types.f32):
                asked = hint.get_type_name()
                raise BackendError(f"OpenVINO would compute in {found.get_type_name()} in place of {asked}")
            self._requests.append(compiled.create_infer_request())

    def bind(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """Hands an input over until it is bound again; returns the array that OpenVINO reads: ``value``, or a copy
        where that is not contiguous or writable."""
        if name not in self._names:
            raise BackendError(f"the graph has no input {name}")
        array = np.require(value, requirements=["C", "W"])
        tensor = self._openvino.Tensor(array, shared_memory=True)
        for part, request in zip(self._parts, self._requests, strict=True):
            if name in part.inputs:
                request.set_input_tensor(part.inputs.index(name), tensor)
        self._arrays[name] = array
        return array

    def infer(self) -> list[NDArray[Any]]:
        """One call with what is bound; the outputs are only good until the next one."""
        passed: dict[str, Any] = {}
        for part, request in zip(self._parts, self._requests, strict=True):
            for index, name in enumerate(part.inputs):
                if name in passed:
                    request.set_input_tensor(index, passed[name])
            request.start_async()
            request.wait()
            for index, name in enumerate(part.outputs):
                passed[name] = request.get_output_tensor(index)
        return [passed[name].data for name in self._parts[-1].outputs]


def _check_types(model: Any, graph: GraphFile) -> None:
    """OpenVINO goes by what a graph computes, not by what it says."""
    found = [output.get_element_type().get_type_name() for output in model.outputs]
    wanted = [_TYPES[tensor.dtype] for tensor in graph.outputs]
    if found != wanted:
        raise BackendError(f"{graph.path} gives {', '.join(found)}, the manifest says {', '.join(wanted)}")


def _settings(hint: Any, threads: int | None) -> dict[str, Any]:
    """For calls that come one after the other, each as soon as possible."""
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_HYPER_THREADING": False,
        # Pinned threads of two processes would share one core and leave the next one idle.
        "ENABLE_CPU_PINNING": False,
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings
