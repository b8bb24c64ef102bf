"""ONNX Runtime with I/O binding: z and x stay on the device from the backbone to the last reverse step.

Device-agnostic: what runs on CUDA also runs on the CPU provider, where tests exercise it. Buffers are bound by address,
so that a part of one (a step of a table, the first n rows of x, z without its batch axis) needs no copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...sampling.chains import DiffusionChain, Floats, modulation_parts, modulation_rows
from ...sampling.loop import BackboneOutput
from ..blocks import packed

MAX_FIXED_SHAPES = 128
"""Shapes (G, n) whose buffers and captured graphs are kept. ONNX Runtime cannot drop a captured graph, so any further
shape runs without one."""


class BoundGraphs:
    """The backend's calls over open sessions; errors are ONNX Runtime's own.

    With ``fixed`` each shape of the diffusion step has its own buffers, whose addresses never change, and a graph id:
    what the CUDA provider's ``enable_cuda_graph`` asks for. A provider without graphs ignores the id.
    """

    def __init__(
        self, runtime: Any, sessions: dict[str, Any], device: tuple[str, int], fixed: bool, reopen: Callable[[], Any]
    ) -> None:
        """Args:
        sessions: graph kind to session; the diffusion step's is replaced if its CUDA graphs fail.
        device: where buffers live, in ONNX Runtime's words (``cuda`` or ``cpu``, and an index).
        reopen: opens the diffusion step without CUDA graphs.
        """
        self.fixed = fixed
        self._runtime, self._sessions, self._device, self._reopen_step = runtime, sessions, device, reopen
        self._shapes: dict[tuple[int, int], _FixedStep] = {}

    def backbone(self, inputs: Mapping[str, NDArray[Any]]) -> BackboneOutput:
        """The value is z as an OrtValue on the device."""
        binding = self._sessions["backbone"].io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        binding.bind_output("z", *self._device)
        binding.synchronize_inputs()
        self._sessions["backbone"].run_with_iobinding(binding)
        z = binding.get_outputs()[0]
        return BackboneOutput(tuple(z.shape()), z)

    def detail(self, z: BackboneOutput) -> tuple[Floats, Floats]:
        """Score and norm [B, P]; only these leave the device."""
        binding = self._sessions["detail_score"].io_binding()
        # Branch 0 is the first part of z.
        self._bind(binding, "z", z.shape[1:], z.value.data_ptr())
        for name in ("score", "norm"):
            binding.bind_output(name)
        self._sessions["detail_score"].run_with_iobinding(binding)
        score, norm = binding.copy_outputs_to_cpu()
        return score, norm

    def denoise(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        """The whole chain; x_0 [N, C]."""
        if self.fixed:
            try:
                return self._denoise_fixed(z, chain)
            except Exception as error:  # ONNX Runtime's own exceptions share no base class
                reason = " ".join(str(error).split())[:200]
                text = f"ONNX Runtime could not use CUDA graphs, going on without: {reason}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                self.fixed = False
                self._shapes.clear()
                self._sessions["diffusion_step"] = self._reopen_step()
        return self._denoise(z, chain)

    def _denoise(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        """One upload for all tables of the chain, x in two buffers by turns, one download."""
        session, channels, branches = self._sessions["diffusion_step"], chain.x.shape[1], z.shape[0]
        steps = [table for s in chain.segments for table in (s.coefficients, s.noise)]
        (guidance, rows, *blocks), content = packed([chain.guidance[None], chain.rows[None], *steps])
        uploaded = self._put(content)
        base = uploaded.data_ptr()
        # Both start as x_T: rows that have not joined yet are then right in either buffer.
        buffers = [self._put(chain.x.copy()), self._put(chain.x.copy())]
        current = 0
        for segment in chain.segments:
            n = segment.rows
            coefficients, noise, *blocks = blocks
            own = self._rows_of_z(z, chain, rows.at(base), n, buffers[0].data_ptr())
            binding = session.io_binding()
            self._bind(binding, "guidance", (n,), guidance.at(base))
            for start, stop in modulation_parts(len(segment.timesteps), branches * n):
                made = self._modulation(own, segment.timesteps[start:stop])
                shape = (branches, n, made.shape()[-1])
                for index in range(start, stop):
                    self._bind(binding, "x", (n, channels), buffers[current].data_ptr())
                    self._bind(binding, "modulation", shape, made.data_ptr() + 4 * prod(shape) * (index - start))
                    columns = segment.coefficients.shape[1:]
                    self._bind(binding, "coefficients", columns, coefficients.at(base, index))
                    self._bind(binding, "noise", (n, channels), noise.at(base, index))
                    current = 1 - current
                    target = buffers[current].data_ptr()
                    binding.bind_output("x_next", *self._device, np.float32, [n, channels], target)
                    session.run_with_iobinding(binding)
        return np.array(buffers[current].numpy())

    def _modulation(self, z: Any, timesteps: NDArray[np.int64], target: Any = None) -> Any:
        """Modulation [S G n, ...] of timesteps [S, n] and the vectors z [G, n, D], into ``target`` if given."""
        branches, n, width = z.shape()
        row, timestep = modulation_rows(timesteps, branches)
        binding = self._sessions["modulation"].io_binding()
        self._bind(binding, "z", (branches * n, width), z.data_ptr())
        binding.bind_cpu_input("row", row)
        binding.bind_cpu_input("timestep", timestep)
        if target is None:
            binding.bind_output("modulation", *self._device)
        else:
            shape = [len(row), target.shape()[-1]]
            binding.bind_output("modulation", *self._device, np.float32, shape, target.data_ptr())
        binding.synchronize_inputs()
        self._sessions["modulation"].run_with_iobinding(binding)
        return binding.get_outputs()[0] if target is None else target

    def _denoise_fixed(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        """A captured step has its modulation at one address: it is made there step by step."""
        session, x = self._sessions["diffusion_step"], chain.x.copy()
        rows = self._put(chain.rows)
        unsorted = self._put(chain.x)
        for segment in chain.segments:
            n = segment.rows
            step = self._fixed_step(z, n, chain.x.shape[1], segment.coefficients.shape[2])
            step.x[0].update_inplace(x[:n])
            step.guidance.update_inplace(chain.guidance[:n])
            own = self._rows_of_z(z, chain, rows.data_ptr(), n, unsorted.data_ptr())
            for index in range(len(segment.timesteps)):
                self._modulation(own, segment.timesteps[index : index + 1], step.modulation)
                step.coefficients.update_inplace(segment.coefficients[index])
                step.noise.update_inplace(segment.noise[index])
                session.run_with_iobinding(step.bindings[index % 2], step.options[index % 2])
            x[:n] = step.x[len(segment.timesteps) % 2].numpy()
        return x

    def _fixed_step(self, z: BackboneOutput, n: int, channels: int, table: int) -> _FixedStep:
        key = z.shape[0], n
        if key not in self._shapes:
            branches, full = z.shape[0], len(self._shapes) >= MAX_FIXED_SHAPES
            _, _, width = next(i for i in self._sessions["diffusion_step"].get_inputs() if i.name == "modulation").shape
            x = (self._empty((n, channels)), self._empty((n, channels)))
            inputs = {
                "modulation": self._empty((branches, n, width)),
                "coefficients": self._empty((n, table)),
                "guidance": self._empty((n,)),
                "noise": self._empty((n, channels)),
            }
            bindings, options = [], []
            for direction in (0, 1):
                binding = self._sessions["diffusion_step"].io_binding()
                for name, value in {**inputs, "x": x[direction]}.items():
                    binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output("x_next", x[1 - direction])
                option = self._runtime.RunOptions()
                # 0 is ONNX Runtime's own, -1 captures nothing.
                option.add_run_config_entry("gpu_graph_id", str(-1 if full else 2 * len(self._shapes) + 1 + direction))
                bindings.append(binding)
                options.append(option)
            step = _FixedStep(x=x, bindings=bindings, options=options, **inputs)
            if full:
                return step
            self._shapes[key] = step
        return self._shapes[key]

    def _rows_of_z(self, z: BackboneOutput, chain: DiffusionChain, rows: int, n: int, x: int) -> Any:
        """z [G, n, D] of the chain's first n rows; the rest is not needed."""
        session = self._sessions["gather_rows"]
        branches, batch, predicted, width = z.shape
        total, channels = chain.x.shape
        binding = session.io_binding()
        self._bind(binding, "z", (branches, batch * predicted, width), z.value.data_ptr())
        self._bind(binding, "x", (total, channels), x)
        self._bind(binding, "noise", (1, total, channels), x)
        self._bind(binding, "rows", (n,), rows, np.int64)
        for name in ("z_rows", "x_rows", "noise_rows"):
            binding.bind_output(name, *self._device)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    def _bind(self, binding: Any, name: str, shape: Sequence[int], address: int, dtype: Any = np.float32) -> None:
        binding.bind_input(name, *self._device, dtype, list(shape), address)

    def _put(self, array: NDArray[Any]) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *self._device)

    def _empty(self, shape: Sequence[int], dtype: Any = np.float32) -> Any:
        return self._runtime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, *self._device)


@dataclass(frozen=True)
class _FixedStep:
    """Buffers of one shape of the diffusion step, with a binding and a graph for each direction between the two x."""

    x: tuple[Any, Any]
    modulation: Any
    coefficients: Any
    guidance: Any
    noise: Any
    bindings: list[Any]
    options: list[Any]
