"""The OpenVINO package: imported without its usage statistics, and asked what the CPU can."""

from __future__ import annotations

import sys
from typing import Any

_STATISTICS = "openvino_telemetry"


def import_openvino() -> Any:
    """The ``openvino`` module.

    Its import would report itself over the network through a package that comes with it. Without that package it uses
    a stand-in that does nothing; so the package is hidden while OpenVINO is imported.

    Raises:
        ImportError, OSError: OpenVINO is not installed, or is broken.
    """
    if "openvino" not in sys.modules and _STATISTICS not in sys.modules:
        sys.modules[_STATISTICS] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            del sys.modules[_STATISTICS]
    else:
        import openvino
    return openvino


def cpu_capabilities(openvino: Any) -> tuple[str, ...]:
    """What OpenVINO computes in on this CPU, such as ``FP32``, ``BF16`` and ``INT8``."""
    return tuple(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
