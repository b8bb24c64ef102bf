"""ONNX Runtime backend: runs a bundle's graphs as they are, on the CPU provider by default or on CUDA."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError
from ..protocol import Condition, DiffusionChain, Floats, Integers
from .bound import BoundGraphs

INSTALL = "pip install 'gtr-deploy[cpu]'"
INSTALL_CUDA = "pip install 'gtr-deploy[gpu]'"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
    """Sessions for a bundle's graphs, on the CPU or the CUDA provider.

    Attributes:
        description: provider, and CUDA graphs if they are in use.
    """

    name = "onnxruntime"

    def __init__(
        self,
        graphs: Mapping[str, Path],
        threads: int | None = None,
        provider: str = "cpu",
        device: int = 0,
        *,
        cuda_graphs: bool | None = None,
        bound: bool | None = None,
        optimised: bool = True,
    ) -> None:
        """Opens a session for each graph.

        Args:
            graphs: graph kind to ONNX file.
            threads: intra-op threads; ONNX Runtime's default (physical cores) if None.
            provider: ``cpu`` or ``cuda``. CUDA computes float32 products in float32, not TF32.
            device: index of the GPU.
            cuda_graphs: replay each shape of the diffusion step as a CUDA graph; by default where the provider can.
            optimised: False leaves graph optimisations out: Q/DQ graphs are then computed in float exactly as they are
                written, in any type (the CPU provider has no E4M3 products), at float32's cost.
            bound: keep z and x in bound device buffers; by default on CUDA, since on the CPU plain calls are as fast.

        Raises:
            BackendError: ONNX Runtime or its CUDA provider is missing, or refuses a graph.
        """
        try:
            import onnxruntime
        except ImportError:
            install = INSTALL_CUDA if provider == "cuda" else INSTALL
            raise BackendError(f"ONNX Runtime is not installed; {install}") from None
        if provider not in PROVIDERS:
            raise BackendError(f"ONNX Runtime provider {provider!r} is not one of {', '.join(PROVIDERS)}")
        self._runtime = onnxruntime
        self._provider, self._device = provider, device
        if provider == "cuda":
            _check_cuda(onnxruntime)
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        if not optimised:
            self._options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads is not None:
            self._options.intra_op_num_threads = threads
        # Each graph has its own thread pool. Left to themselves, idle threads go on spinning after a call and take the
        # cores from the next graph's: 1.6 to 1.9 times the time of mar-digits on two cores, 1.04 to 1.08 of mar-b.
        self._options.add_session_config_entry("session.force_spinning_stop", "1")
        fixed = (provider == "cuda") if cuda_graphs is None else cuda_graphs
        self._sessions: dict[str, Any] = {}
        self._bound: BoundGraphs | None = None
        for kind, path in graphs.items():
            if kind == "diffusion_step" and provider == "cuda" and fixed:
                try:
                    self._sessions[kind] = self._open(path, cuda_graph=True)
                    continue
                except BackendError as error:
                    fixed = False
                    warnings.warn(f"{error}; going on without CUDA graphs", RuntimeWarning, stacklevel=2)
            self._sessions[kind] = self._open(path)
        if provider == "cuda" if bound is None else bound:
            self._bound = BoundGraphs(
                onnxruntime,
                self._sessions,
                provider,
                device if provider == "cuda" else 0,
                fixed,
                lambda: self._open(graphs["diffusion_step"]),
            )

    @property
    def description(self) -> str:
        """Such as ``onnxruntime cuda, CUDA graphs``."""
        graphs = self._provider == "cuda" and self._bound is not None and self._bound.fixed
        return f"{self.name} {self._provider}" + (", CUDA graphs" if graphs else "")

    def _open(self, path: Path, cuda_graph: bool = False) -> Any:
        providers: list[Any] = [PROVIDERS["cpu"]]
        if self._provider == "cuda":
            settings = {"device_id": str(self._device), "use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))}
            providers.insert(0, (PROVIDERS["cuda"], settings))
        try:
            session = self._runtime.InferenceSession(str(path), self._options, providers=providers)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise BackendError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error
        # A CUDA provider whose libraries do not load is dropped without an error.
        active = session.get_providers()[0]
        if active != PROVIDERS[self._provider]:
            raise BackendError(
                f"ONNX Runtime fell back to {active} for GPU {self._device}: its CUDA provider did not start; check "
                f"nvidia-smi and that CUDA and cuDNN fit this onnxruntime-gpu ({INSTALL_CUDA}), or use --provider cpu"
            )
        return session

    def run(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One graph call with plain arrays.

        Raises:
            BackendError: the graph is not there, or the call fails.
        """
        options = None
        if self._provider == "cuda":
            # Plain arrays have no fixed addresses, so such a call must neither be captured nor replayed.
            options = self._runtime.RunOptions()
            options.add_run_config_entry("gpu_graph_id", "-1")
        with self._one_line_errors(kind):
            return self._sessions[kind].run(None, dict(inputs), options)

    @contextlib.contextmanager
    def _one_line_errors(self, kind: str) -> Iterator[None]:
        if kind not in self._sessions:
            raise BackendError(f"this bundle has no {kind} graph")
        try:
            yield
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in the {kind} graph: {_first_line(error)}") from error

    def condition(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, labels: Integers
    ) -> Condition:
        if self._bound is not None:
            with self._one_line_errors("backbone"):
                return self._bound.condition(tokens, visible, predict, context, labels)
        inputs = {"tokens": tokens, "visible": visible, "predict": predict, "context": context, "labels": labels}
        (z,) = self.run("backbone", inputs)
        branches, batch, predicted, width = z.shape
        return Condition((branches, batch, predicted, width), z)

    def detail(self, condition: Condition) -> tuple[Floats, Floats]:
        if self._bound is not None:
            with self._one_line_errors("detail_score"):
                return self._bound.detail(condition)
        score, norm = self.run("detail_score", {"z": condition.value[0]})
        return score, norm

    def denoise(self, condition: Condition, chain: DiffusionChain) -> Floats:
        if self._bound is not None:
            with self._one_line_errors("diffusion_step"):
                return self._bound.denoise(condition, chain)
        branches, batch, predicted, width = condition.shape
        z = condition.value.reshape(branches, batch * predicted, width)[:, chain.rows]
        x = chain.x.copy()
        for segment in chain.segments:
            n = segment.rows
            inputs = {"x": x[:n], "z": np.ascontiguousarray(z[:, :n]), "guidance": chain.guidance[:n]}
            for index in range(len(segment.timesteps)):
                inputs["timestep"] = segment.timesteps[index]
                inputs["coefficients"] = segment.coefficients[index]
                inputs["noise"] = segment.noise[index]
                (inputs["x"],) = self.run("diffusion_step", inputs)
            x[:n] = inputs["x"]
        return x

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        (image,) = self.run("decoder", {"latents": latents})
        return image


def _check_cuda(runtime: Any) -> None:
    available = runtime.get_available_providers()
    if PROVIDERS["cuda"] not in available:
        raise BackendError(
            f"this onnxruntime {runtime.__version__} has no {PROVIDERS['cuda']} (it has {', '.join(available)}); "
            f"pip uninstall onnxruntime, then {INSTALL_CUDA}"
        )
    if hasattr(runtime, "preload_dlls"):
        # Finds CUDA and cuDNN where pip has put them; what it prints must not get into --json output.
        with contextlib.redirect_stdout(sys.stderr):
            runtime.preload_dlls()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
