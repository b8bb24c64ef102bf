"""ONNX Runtime backend: runs a bundle's graphs as they are, on the CPU provider by default or on CUDA."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.graph_file import GraphFile
from ...errors import BackendError
from ...machine.examine import INSTALL
from ...models.conditioning import Arrays
from ...sampling.chains import DiffusionChain, Floats, Integers
from ...sampling.loop import BackboneOutput
from ..host_loop import HostLoopBackend
from ..protocol import hooked
from .bound import BoundGraphs

_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend(HostLoopBackend):
    """Sessions for a bundle's graphs, on the CPU or the CUDA provider."""

    name = "onnxruntime"

    def __init__(
        self,
        graphs: Mapping[str, Path | GraphFile],
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
            graphs: graph kind to a bundle's graph, to a changed copy of one, or to an ONNX file of our own making.
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
            install = INSTALL["onnxruntime-cuda" if provider == "cuda" else "onnxruntime"]
            raise BackendError(f"ONNX Runtime is not installed; {install}") from None
        if provider not in PROVIDERS:
            raise BackendError(f"ONNX Runtime provider {provider!r} is not one of {', '.join(PROVIDERS)}")
        self._runtime = onnxruntime
        self._provider, self._device = provider, device
        if provider == "cuda":
            _check_cuda(onnxruntime)
        self._threads, self._optimised = threads, optimised
        self._options = self._session_options()
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
            place = (provider, device if provider == "cuda" else 0)
            step = "diffusion_step"
            self._bound = BoundGraphs(onnxruntime, self._sessions, place, fixed, lambda: self._open(graphs[step]))

    @property
    def description(self) -> str:
        """Such as ``onnxruntime cuda, CUDA graphs``."""
        graphs = self._provider == "cuda" and self._bound is not None and self._bound.fixed
        return f"{self.name} {self._provider}" + (", CUDA graphs" if graphs else "")

    def _session_options(self) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, too; the log would show their text raw
        if not self._optimised:
            options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Each graph has its own thread pool. Left to themselves, idle threads go on spinning after a call and take the
        # cores from the next graph's: 1.6 to 1.9 times the time of mar-digits on two cores, 1.04 to 1.08 of mar-b.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _open(self, graph: Path | GraphFile, cuda_graph: bool = False) -> Any:
        providers: list[Any] = [PROVIDERS["cpu"]]
        if self._provider == "cuda":
            settings = {"device_id": str(self._device), "use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))}
            providers.insert(0, (PROVIDERS["cuda"], settings))
        path, source, options = graph, str(graph), self._options
        try:
            if isinstance(graph, GraphFile):
                path, source, options = graph.path, graph.model, self._session_options()
                if graph.linked:  # it follows no link out of the folder; the mapping is what it copies from
                    data = graph.stamps[1][0]
                    mapped = np.memmap(data, np.uint8, "r")
                    options.add_external_initializers_from_files_in_memory([data.name], [mapped], [mapped.size])
                else:
                    options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(path.parent.resolve()))
            session = self._runtime.InferenceSession(source, options, providers=providers)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise BackendError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error
        if isinstance(graph, GraphFile):
            graph.confirm()
        # A CUDA provider whose libraries do not load is dropped without an error.
        active = session.get_providers()[0]
        if active != PROVIDERS[self._provider]:
            raise BackendError(
                f"ONNX Runtime fell back to {active} for GPU {self._device}: its CUDA provider did not start; check "
                f"nvidia-smi and that CUDA and cuDNN fit this onnxruntime-gpu ({INSTALL['onnxruntime-cuda']}), "
                "or use --provider cpu"
            )
        return session

    def run_graph(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
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
        self.calling = kind, time.monotonic()
        try:
            yield
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in the {kind} graph: {_first_line(error)}") from error
        finally:
            self.calling = None

    def backbone(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, conditioning: Arrays
    ) -> BackboneOutput:
        if (bound := self._bound) is None:
            return super().backbone(tokens, visible, predict, context, conditioning)
        inputs = {"tokens": tokens, "visible": visible, "predict": predict, "context": context, **conditioning}
        with self._one_line_errors("backbone"):
            return hooked(self.hook, "backbone", inputs, lambda: (bound.backbone(inputs),))[0]

    def detail(self, z: BackboneOutput) -> tuple[Floats, Floats]:
        if (bound := self._bound) is None:
            return super().detail(z)
        with self._one_line_errors("detail_score"):
            return hooked(self.hook, "detail_score", {}, lambda: bound.detail(z))

    def denoise(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        if (bound := self._bound) is None:
            return super().denoise(z, chain)
        with self._one_line_errors("diffusion_step"):
            return hooked(self.hook, "diffusion_step", {}, lambda: (bound.denoise(z, chain),))[0]


def _check_cuda(runtime: Any) -> None:
    available = runtime.get_available_providers()
    if PROVIDERS["cuda"] not in available:
        raise BackendError(
            f"this onnxruntime {runtime.__version__} has no {PROVIDERS['cuda']} (it has {', '.join(available)}); "
            f"pip uninstall onnxruntime, then {INSTALL['onnxruntime-cuda']}"
        )
    if hasattr(runtime, "preload_dlls"):
        # Finds CUDA and cuDNN where pip has put them; what it prints must not get into --json output.
        with contextlib.redirect_stdout(sys.stderr):
            runtime.preload_dlls()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
