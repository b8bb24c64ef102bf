"""The torch backend's row in the table of backends; entry point ``torch``. Imports no torch: doctor lists it, too."""

from __future__ import annotations

import importlib.util

from ...runtime.backends.protocol import Backend
from ...runtime.backends.row import BackendOptions, BackendRow
from ...runtime.bundle.reader import Bundle
from ...runtime.machine.examine import Machine
from ...runtime.models.graphs import QUANTISED
from ..build.sources import find_weights


def _open(bundle: Bundle, options: BackendOptions, checksums: bool) -> Backend:
    from .torch_backend import open_backend

    device = options.provider
    if device == "cuda" or (device == "auto" and options.device):
        device = f"cuda:{options.device}"
    return open_backend(
        bundle,
        device=device,
        precision=options.precision,
        cuda_graphs=options.cuda_graph != "off",
        threads=options.threads,
    )


def _lacks(machine: Machine) -> str:
    try:
        found = importlib.util.find_spec("torch") is not None
    except ImportError:
        found = False
    return "" if found else "PyTorch is not installed; pip install 'gtr-deploy[export]'"


def _refuses(bundle: Bundle, machine: Machine) -> str:
    if bundle.precision in QUANTISED:
        return f"the torch backend has no precision {bundle.precision}"
    source = bundle.manifest.source
    for name, recorded in (("checkpoint", source.checkpoint), ("vae", source.vae)):
        if recorded is not None and find_weights(bundle.architecture.name, name, recorded.sha256) is None:
            return f"PyTorch reads the {name}, not the graphs, and the one of this bundle is not known on this machine"
    return ""


TORCH = BackendRow(
    "torch",
    _open,
    what="the slow reference, from the checkpoint that the bundle was made from",
    install="pip install 'gtr-deploy[export]'",
    reads_graphs=False,
    lacks=_lacks,
    refuses=_refuses,
)
