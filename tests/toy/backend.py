"""What a stranger would add: a backend in one file. It runs a bundle's graphs and leaves the rest to the host loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from gtr_deploy.runtime.backends.host_loop import HostLoopBackend
from gtr_deploy.runtime.backends.protocol import Backend
from gtr_deploy.runtime.backends.row import BackendOptions, BackendRow
from gtr_deploy.runtime.bundle.reader import Bundle


class ToyBackend(HostLoopBackend):
    """One plain session per graph, one thread."""

    name = "toy"

    def __init__(self, bundle: Bundle, checksums: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._sessions = {
            kind: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for kind, path in bundle.graph_paths(checksums, target="cpu").items()
        }

    def run_graph(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        return self._sessions[kind].run(None, dict(inputs))


def _open(bundle: Bundle, options: BackendOptions, checksums: bool) -> Backend:
    return ToyBackend(bundle, checksums)


ROW = BackendRow("toy", _open, what="a stranger's backend", library="onnxruntime", unsupported={"fp8": "no {model}"})
