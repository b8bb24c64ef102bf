"""Shared fixtures: real bundles of the shipped model, built once per test run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from commands import runner
from fakes import cudart
from fakes.bundles import VERSIONS
from fakes.machine import FakeMachine
from fakes.tensorrt import make_module

from gtr_deploy.export.build.build import build
from gtr_deploy.export.build.request import BuildRequest
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.pipeline import Pipeline

os.environ.setdefault("OMP_NUM_THREADS", "1")
with contextlib.suppress(ImportError):
    import readline  # noqa: F401 - it leaves the terminal's size to every child process, where lines would wrap
for _size in {"COLUMNS", "LINES"} - os.environ.keys():
    os.unsetenv(_size)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache folder."""
    monkeypatch.setenv("GTR_DEPLOY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _exporter_untraced() -> Iterator[None]:
    """Coverage looks at every call inside PyTorch's exporter otherwise, none of which is ours, and doubles its time."""
    import torch

    real = torch.onnx.export

    def untraced(*args: Any, **options: Any) -> Any:
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return real(*args, **options)
        finally:
            sys.settrace(tracer)

    torch.onnx.export = untraced
    yield
    torch.onnx.export = real


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all worker processes of one test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def build_digits(shared_folder: Path) -> Callable[[str], Path]:
    """mar-digits in a precision: read only! Whichever process asks first builds it."""

    def get(precision: str) -> Path:
        out = shared_folder / f"mar-digits-{precision}"
        with (shared_folder / f"{precision}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                build(BuildRequest("mar-digits", out, precision=precision), Reporter(quiet=True))
        return out

    return get


@pytest.fixture(scope="session")
def digits_bundle(build_digits: Callable[[str], Path]) -> Path:
    """The fp32 bundle of the shipped model; read only."""
    return build_digits("fp32")


@pytest.fixture
def own_bundle(digits_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(digits_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def digits_pipeline(digits_bundle: Path) -> Pipeline:
    """The shipped model on ONNX Runtime, one thread."""
    return Pipeline.load(Bundle.load(digits_bundle), "onnxruntime", threads=1)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    """CUDA and both TensorRT libraries, faked; at the end no address was wrong and nothing raced."""
    machine = FakeMachine()
    cudart.install(monkeypatch, machine)
    for name, flavour in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")):
        monkeypatch.setitem(sys.modules, name, make_module(machine, flavour, VERSIONS[flavour]))
    yield machine
    assert machine.faults == []
    assert machine.races == []


@pytest.fixture
def run_cli() -> Callable[..., Result]:
    """Runs ``gtr-run`` (or another command group) in this process."""
    from gtr_deploy.runtime.cli import main

    def call(*arguments: str | Path, group=main) -> Result:
        return runner().invoke(group, [str(argument) for argument in arguments], prog_name=group.name)

    return call


@pytest.fixture
def export_cli(run_cli: Callable[..., Result]) -> Callable[..., Result]:
    """Runs ``gtr-export`` in this process."""
    from gtr_deploy.export.cli import main

    def call(*arguments: str | Path) -> Result:
        return run_cli(*arguments, group=main)

    return call
