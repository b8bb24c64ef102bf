"""ONNX Runtime backend: runs a bundle's graphs as they are; CPU is the embedded default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError
from .base import Condition, DiffusionChain, Floats, Integers

INSTALL = "pip install 'gtr-deploy[cpu]'"


class OnnxRuntimeBackend:
    """Sessions for the four graphs, on the CPU provider."""

    name = "onnxruntime"

    def __init__(self, graphs: Mapping[str, Path], threads: int | None = None) -> None:
        """Opens a session for each graph.

        Args:
            graphs: graph kind to ONNX file.
            threads: intra-op threads; ONNX Runtime's default (physical cores) if None.

        Raises:
            BackendError: ONNX Runtime is missing, or refuses a graph.
        """
        try:
            import onnxruntime
        except ImportError:
            raise BackendError(f"ONNX Runtime is not installed; {INSTALL}") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._sessions: dict[str, Any] = {}
        for kind, path in graphs.items():
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's own exceptions share no base class
                raise BackendError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error
            self._sessions[kind] = session

    def run(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One graph call with plain arrays.

        Raises:
            BackendError: the graph is not there, or the call fails.
        """
        try:
            return self._sessions[kind].run(None, dict(inputs))
        except KeyError:
            raise BackendError(f"this bundle has no {kind} graph") from None
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in the {kind} graph: {_first_line(error)}") from error

    def condition(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, labels: Integers
    ) -> Condition:
        inputs = {"tokens": tokens, "visible": visible, "predict": predict, "context": context, "labels": labels}
        (z,) = self.run("backbone", inputs)
        branches, batch, predicted, width = z.shape
        return Condition((branches, batch, predicted, width), z)

    def detail(self, condition: Condition) -> tuple[Floats, Floats]:
        score, norm = self.run("detail_score", {"z": condition.value[0]})
        return score, norm

    def denoise(self, condition: Condition, chain: DiffusionChain) -> Floats:
        branches, batch, predicted, width = condition.shape
        z = condition.value.reshape(branches, batch * predicted, width)[:, chain.rows]
        x = chain.x.copy()
        for segment in chain.segments:
            n = segment.rows
            active, fixed = x[:n], {"z": np.ascontiguousarray(z[:, :n]), "guidance": chain.guidance[:n]}
            for index in range(len(segment.timesteps)):
                (active,) = self.run(
                    "diffusion_step",
                    {
                        **fixed,
                        "x": active,
                        "timestep": segment.timesteps[index],
                        "coefficients": segment.coefficients[index],
                        "noise": segment.noise[index],
                    },
                )
            x[:n] = active
        return x

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        (image,) = self.run("decoder", {"latents": latents})
        return image


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
