"""Imports TensorRT or TensorRT-RTX, and keeps what it logs: a failed call returns None, and only the log says why."""

from __future__ import annotations

import functools
import importlib
import re
from types import ModuleType
from typing import Any

from ...bundle.engine_sets import FLAVOURS
from ...errors import BackendError
from ...machine.examine import INSTALL

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

#: Said about every graph with int64 inputs, or about a cache that TensorRT-RTX no longer has; nobody can act on it.
_NOISE = ("has Int64 binding", "timing cache will not be used")


def load_library(flavour: str) -> ModuleType:
    """The Python module of a key of ``FLAVOURS``.

    Raises:
        BackendError: it is not installed, or does not load; one line with what installs it.
    """
    name, install = FLAVOURS[flavour], INSTALL[flavour]
    try:
        trt = importlib.import_module(_MODULES[flavour])
    except ModuleNotFoundError as error:
        if error.name == _MODULES[flavour]:
            raise BackendError(f"{name} is not installed; {install}") from None
        raise BackendError(f"{name} is only half installed: no module {error.name}; {install}") from None
    except Exception as error:  # a broken library fails in any way it likes: ImportError, OSError, RuntimeError
        text = " ".join(str(error).split()) or type(error).__name__
        if missing := re.search(r"(\S+\.(?:so|dll|dylib)\S*?):? cannot open shared object file", text):
            text = f"the shared library {missing[1]} is missing"
        raise BackendError(f"{name} is installed but does not load: {text}; {install}") from None
    if not hasattr(trt, "Builder"):  # what is left of a package after its files went: an empty folder imports
        raise BackendError(f"{name} is only half installed: {_MODULES[flavour]} is empty; {install}")
    return trt


@functools.cache
def library_log(trt: ModuleType) -> LogCollector:
    """The library's one log in this process: it knows one logger, ignores a second, and may use the first for ever."""
    return LogCollector(trt)


class LogCollector:
    """Keeps a library's messages since the last :meth:`clear`, oldest first; ``logger`` is what the library wants."""

    def __init__(self, trt: ModuleType) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.logger = _logger(trt, self)

    def clear(self) -> None:
        """Forgets all messages."""
        self.errors.clear()
        self.warnings.clear()

    def last_error(self) -> str:
        """The newest error in one line."""
        return self.errors[-1] if self.errors else "the library gives no reason"


def _logger(trt: ModuleType, keep: LogCollector) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # not super(): pybind wants its own initializer called by name

        def log(self, severity: Any, msg: str) -> None:
            # Called from the library's own threads; appending to a list needs no lock.
            text = " ".join(str(msg).split())
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                keep.errors.append(text)
            elif severity == trt.ILogger.WARNING and not any(noise in text for noise in _NOISE):
                keep.warnings.append(text)

    return Logger()
