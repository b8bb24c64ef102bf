"""The torch backend: the modules themselves, on the CPU or on CUDA, same interface as runtime/backends.

The reference that parity is measured against. With CUDA graphs the reverse steps of one AR step are one replay; the
backbone and the decoder run eagerly, and nothing is compiled. This is not PyTorch at its best.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...runtime.backends.host_loop import HostLoopBackend
from ...runtime.backends.protocol import hooked
from ...runtime.bundle.reader import Bundle
from ...runtime.commands.console import Reporter
from ...runtime.errors import BackendError, GtrError
from ...runtime.models.conditioning import Arrays
from ...runtime.models.graphs import QUANTISED
from ...runtime.sampling.chains import DiffusionChain, Floats, Integers, modulation_parts, modulation_rows
from ...runtime.sampling.loop import BackboneOutput
from ..build.sources import weights_of_bundle
from ..graphs.layers import Linear
from ..networks import DTYPES, Networks, build_networks

MAX_CHAINS = 128
"""Shapes of chains whose buffers and CUDA graphs are kept; the oldest goes first."""


class TorchBackend(HostLoopBackend):
    """Runs the modules eagerly, or replays captured chains. Moves the modules of ``networks`` to the device.

    On CUDA, TF32 is switched off for the process: float32 products there keep 10 bits of mantissa otherwise, which is
    further from the CPU's than any tolerance allows.
    """

    name = "torch"

    def __init__(self, networks: Networks, device: str = "cpu", cuda_graphs: bool = False) -> None:
        """Args:
            networks: the modules, in one precision.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            cuda_graphs: capture each shape of chain once and replay it; CUDA only, ignored on the CPU.

        Raises:
            BackendError: torch cannot use the device.
        """
        self._device = _usable(device)
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        self._networks = networks
        for module in vars(networks).values():
            if module is not None:
                module.to(self._device)
        self._precision = _precision(networks.diffusion_step)
        self._capture = cuda_graphs and on_cuda
        self._keep = self._capture  # the buffers of each shape of chain
        self._chains: dict[tuple[int, ...], _Chain] = {}
        # One pool for all graphs: nothing in it outlives a replay, results are in buffers outside.
        self._pool = torch.cuda.graph_pool_handle() if self._capture else None

    @property
    def description(self) -> str:
        """Such as ``torch cuda fp16, CUDA graphs``."""
        return f"{self.name} {self._device.type} {self._precision}" + (", CUDA graphs" if self._capture else "")

    def backbone(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, conditioning: Arrays
    ) -> BackboneOutput:
        inputs = {"tokens": tokens, "visible": visible, "predict": predict, "context": context, **conditioning}
        (z,) = hooked(self.hook, "backbone", inputs, lambda: self._called("backbone", inputs))
        branches, batch, predicted, width = z.shape
        return BackboneOutput((branches, batch, predicted, width), z)

    def detail(self, z: BackboneOutput) -> tuple[Floats, Floats]:
        score, norm = hooked(self.hook, "detail_score", {}, lambda: self._called("detail_score", {"z": z.value[0]}))
        return score.cpu().numpy(), norm.cpu().numpy()

    def run_graph(self, kind: str, inputs: Mapping[str, NDArray]) -> list[NDArray]:
        return [output.cpu().numpy() for output in self._called(kind, inputs)]

    @torch.inference_mode()
    def _called(self, kind: str, inputs: Mapping[str, NDArray | Tensor]) -> tuple[Tensor, ...]:
        values = (value if isinstance(value, Tensor) else _host(value) for value in inputs.values())
        if (network := getattr(self._networks, kind)) is None:
            raise BackendError(f"this model has no {kind}")
        outputs = network(*(value.to(self._device) for value in values))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def denoise(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        return hooked(self.hook, "diffusion_step", {}, lambda: (self._denoised(z, chain),))[0]

    @torch.inference_mode()
    def _denoised(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        steps = self._chain(z, chain)
        steps.load(z, chain)
        if self._capture and steps.graph is None:
            try:
                steps.capture(self._pool)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                line = f"torch could not capture a CUDA graph, going on without: {reason}"
                warnings.warn(line, RuntimeWarning, stacklevel=2)
                self._capture = self._keep = False
                self._chains.clear()
                steps = self._chain(z, chain)
            # Capturing has run some steps on what was loaded.
            steps.load(z, chain)
        steps.replay()
        # A copy even on the CPU, where kept buffers will be written again.
        return steps.x.to("cpu", copy=True).numpy()

    def _chain(self, z: BackboneOutput, chain: DiffusionChain) -> _Chain:
        shapes = [size for segment in chain.segments for size in segment.noise.shape[:2]]
        key = (z.shape[0], len(chain.rows), *shapes)
        found = self._chains.get(key)
        if found is None:
            found = _Chain(self._networks, z, chain, self._device)
            if self._keep:
                if len(self._chains) >= MAX_CHAINS:
                    self._chains.pop(next(iter(self._chains)))
                self._chains[key] = found
        return found


class _Chain:
    """The reverse steps of one shape of chain, over buffers that stay where they are. x [N, C] holds the result."""

    def __init__(self, networks: Networks, z: BackboneOutput, chain: DiffusionChain, device: torch.device) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self._networks = networks

        def like(array: NDArray) -> Tensor:
            return torch.zeros(array.shape, dtype=_host(array).dtype, device=device)

        self.x, self._guidance, self._rows = like(chain.x), like(chain.guidance), like(chain.rows)
        branches, _, _, width = z.shape
        self._z = torch.zeros((branches, len(chain.rows), width), device=device)
        self._segments: list[tuple[Tensor, ...]] = [
            tuple(map(like, (*modulation_rows(segment.timesteps, branches), segment.coefficients, segment.noise)))
            for segment in chain.segments
        ]

    def load(self, z: BackboneOutput, chain: DiffusionChain) -> None:
        """Uploads everything the chain needs, once: from pinned memory on CUDA, so that nothing waits."""
        branches, batch, predicted, width = z.shape
        self._upload(self._rows, chain.rows)
        self._z.copy_(z.value.reshape(branches, batch * predicted, width).index_select(1, self._rows))
        self._upload(self.x, chain.x)
        self._upload(self._guidance, chain.guidance)
        for buffers, segment in zip(self._segments, chain.segments, strict=True):
            rows = modulation_rows(segment.timesteps, branches)
            for buffer, array in zip(buffers, (*rows, segment.coefficients, segment.noise), strict=True):
                self._upload(buffer, array)

    def run(self, limit: int | None = None) -> None:
        """All steps, or at most ``limit`` of each segment; nothing here depends on values, only on shapes."""
        modulate, denoise = self._networks.modulation, self._networks.diffusion_step
        for row, timestep, coefficients, noise in self._segments:
            n = noise.shape[1]
            x, z, guidance = self.x[:n], self._z[:, :n].flatten(0, 1), self._guidance[:n]
            for start, stop in modulation_parts(len(noise) if limit is None else min(limit, len(noise)), len(z)):
                part = slice(start * len(z), stop * len(z))
                made = modulate(z, row[part], timestep[part]).unflatten(0, (stop - start, -1, n))
                for index in range(start, stop):
                    x.copy_(denoise(x, made[index - start], coefficients[index], guidance, noise[index]))

    def capture(self, pool) -> None:
        """Makes ``run`` one CUDA graph. What it leaves in x is not a result."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Libraries initialise and allocate on their first calls, which must not happen during capture.
            self.run(limit=2)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.run()
        self.graph = graph

    def replay(self) -> None:
        """All steps on what is loaded."""
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    def _upload(self, buffer: Tensor, array: NDArray) -> None:
        host = _host(array)
        if buffer.is_cuda:
            # torch's host allocator keeps the pinned block until the copy is done.
            host = host.pin_memory()
        buffer.copy_(host, non_blocking=True)


def open_backend(
    bundle: Bundle,
    *,
    device: str = "auto",
    precision: str | None = None,
    cuda_graphs: bool = True,
    threads: int | None = None,
) -> TorchBackend:
    """Runs the weights that a bundle was built from; entry point ``torch`` of the group ``gtr_deploy.backends``.

    Args:
        bundle: names the weights; its graphs are not used.
        device: ``auto`` (CUDA where torch can use it), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``fp32``, ``fp16`` or ``bf16``; the bundle's by default, fp32 where that is a quantised one.
        cuda_graphs: see :class:`TorchBackend`.
        threads: of one call on the CPU, for the whole process; torch's default if None.

    Raises:
        GtrError: the weights are not found, or torch has no such precision.
        BackendError: torch cannot use the device.
    """
    precision = precision or ("fp32" if bundle.precision in QUANTISED else bundle.precision)
    if precision not in DTYPES:
        raise GtrError(f"torch does not run precision {precision}, only {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _usable(device)
    weights, why_not = weights_of_bundle(bundle, None, None, Reporter(quiet=True))
    if weights is None:
        raise GtrError(f"the torch backend needs the bundle's weights: {why_not}")
    if threads is not None:
        torch.set_num_threads(threads)
    networks = build_networks(bundle.architecture, weights.checkpoint(), weights.vae(), precision)
    return TorchBackend(networks, device, cuda_graphs)


def _usable(device: str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise BackendError(f"torch device {device!r} is not one of cpu, cuda, cuda:N")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(f"torch {torch.__version__} cannot use CUDA here; use the device cpu, or a CUDA build")
        found = torch.device("cuda", found.index or 0)
        if found.index >= torch.cuda.device_count():
            raise BackendError(f"torch sees {torch.cuda.device_count()} GPUs, there is no device {found.index}")
        torch.cuda.set_device(found)
    return found


def _precision(step: nn.Module) -> str:
    """Of the layers that take part in ``set_precision``."""
    layers = (module for module in step.modules() if isinstance(module, Linear) and not module.keep_float32)
    dtype = next((layer.weight.dtype for layer in layers), torch.float32)
    return next(name for name, known in DTYPES.items() if known == dtype)


def _host(array: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
