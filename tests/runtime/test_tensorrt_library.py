"""One line for each way in which a TensorRT is not there."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gtr_deploy.runtime.backends.tensorrt.library import LogCollector, load_library
from gtr_deploy.runtime.errors import BackendError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt"),
            "TensorRT is not installed; pip install 'gtr-deploy[tensorrt]'",
        ),
        (
            ModuleNotFoundError("No module named 'tensorrt_bindings'", name="tensorrt_bindings"),
            "TensorRT is only half installed: no module tensorrt_bindings; pip install 'gtr-deploy[tensorrt]'",
        ),
        (
            ImportError("libnvinfer.so.11: cannot open shared object file: No such file or directory"),
            "TensorRT is installed but does not load: the shared library libnvinfer.so.11 is missing; "
            "pip install 'gtr-deploy[tensorrt]'",
        ),
        (
            OSError("/opt/libcudart.so: invalid\nELF header"),
            "TensorRT is installed but does not load: /opt/libcudart.so: invalid ELF header; "
            "pip install 'gtr-deploy[tensorrt]'",
        ),
        (RuntimeError(), "TensorRT is installed but does not load: RuntimeError; pip install 'gtr-deploy[tensorrt]'"),
    ],
)
def test_import_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def refuse(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(BackendError) as caught:
        load_library("tensorrt")
    assert str(caught.value) == line


def test_what_is_left_of_a_package_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt" / "plugin").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "tensorrt", raising=False)
    with pytest.raises(BackendError, match="only half installed: tensorrt is empty"):
        load_library("tensorrt")


def test_log_is_kept_by_severity_without_noise() -> None:
    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    log = LogCollector(SimpleNamespace(ILogger=ILogger))  # type: ignore[arg-type]
    logger: Any = log.logger
    assert log.last_error() == "the library gives no reason"
    logger.log(ILogger.ERROR, "first\n  line")
    logger.log(ILogger.INTERNAL_ERROR, "second")
    logger.log(ILogger.WARNING, "careful")
    logger.log(ILogger.WARNING, "Make sure input labels has Int64 binding.")
    logger.log(ILogger.INFO, "chatter")
    assert (log.errors, log.warnings, log.last_error()) == (["first line", "second"], ["careful"], "second")
    log.clear()
    assert (log.errors, log.warnings) == ([], [])
    assert isinstance(logger, ILogger)


def test_the_real_library_takes_the_logger() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs pip install 'gtr-deploy[tensorrt-rtx]'")
    assert load_library("tensorrt-rtx") is trt
    log = LogCollector(trt)
    assert trt.Builder(log.logger) is not None
