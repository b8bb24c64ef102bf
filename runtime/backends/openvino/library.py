"""The OpenVINO package: imported without its usage statistics, read ONNX with, its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import BackendError

#: Lines of an OpenVINO error that say where in its sources it was raised.
_PLACES = ("Exception from ", "Caught exception: ", "Check '", "FrontEnd API failed")


def read_onnx(openvino: Any, path: Path) -> Any:
    """An ``openvino.Model``, in the types and with the tensor names of the file.

    Raises:
        BackendError: the file is not there, is not ONNX, or has something that OpenVINO does not know.
    """
    try:
        # Core.read_model would offer a damaged file to its readers of other formats, which print their complaints.
        reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
        model = reader.convert(reader.load(str(path)))
    except Exception as error:  # OpenVINO's own exceptions share no base class
        raise BackendError(f"OpenVINO cannot read {path}: {reason(error)}") from error
    if not model.outputs:  # an empty file is a graph with nothing in it
        raise BackendError(f"OpenVINO cannot read {path}: there is no graph in it")
    return model


def reason(error: Exception) -> str:
    """What is wrong, in one line: OpenVINO's messages are mostly about where in its sources they come from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_PLACES)]
    return (telling or lines or [type(error).__name__])[-1][:150]
