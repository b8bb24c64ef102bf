"""What this machine has: GPU, driver, engine libraries. Looks only: nothing here raises, and nothing runs on the GPU.

Imports onnxruntime, OpenVINO and TensorRT (their import decides whether they are usable), never torch or onnx.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from . import cuda
from .cuda import Gpu
from .openvino import cpu_capabilities, import_openvino

#: library -> the line that installs it
INSTALL: Mapping[str, str] = {
    "onnxruntime": "pip install 'gtr-deploy[cpu]'",
    "onnxruntime-cuda": "pip install 'gtr-deploy[gpu]'",
    "openvino": "pip install 'gtr-deploy[openvino]'",
    "tensorrt": "pip install 'gtr-deploy[tensorrt]'",
    "tensorrt-rtx": "pip install 'gtr-deploy[tensorrt-rtx]'",
}

CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""What decides how fast a CPU is at 8-bit and bfloat16 products."""


def _parts(name: str) -> tuple[str, ...]:
    """TensorRT's own name is a stub on PyPI that pulls these in; they can also be installed alone."""
    return tuple(f"{name}-{cuda}{part}" for part in ("", "-bindings") for cuda in ("cu13", "cu12"))


#: library -> module and every distribution name it comes under
_LIBRARIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "onnxruntime": ("onnxruntime", ("onnxruntime", "onnxruntime-gpu")),
    "openvino": ("openvino", ("openvino",)),
    "tensorrt": ("tensorrt", ("tensorrt", *_parts("tensorrt"), "tensorrt-bindings")),
    "tensorrt-rtx": ("tensorrt_rtx", ("tensorrt-rtx", *_parts("tensorrt-rtx"))),
    "cuda-bindings": ("cuda.bindings.runtime", ("cuda-bindings",)),
    "polygraphy": ("polygraphy", ("polygraphy",)),
    "numpy": ("numpy", ("numpy",)),
}


@dataclass(frozen=True)
class Machine:
    """What decides whether a backend or an engine can run here.

    Attributes:
        system: such as ``linux-x86_64``.
        gpu: the one that was asked about.
        gpu_problem: why there is no GPU, one line; empty if there is one.
        versions: library to version; None where it cannot be used.
        onnxruntime_providers: execution providers that onnxruntime was built with.
        problems: library to one line, for those that are installed but do not import.
        openvino_capabilities: what OpenVINO computes in on this CPU, such as ``FP32`` and ``BF16``.
        cpu_features: those of :data:`CPU_FEATURES` that the CPU has; none where the system does not tell.
    """

    system: str
    gpu: Gpu | None
    gpu_problem: str
    versions: Mapping[str, str | None]
    onnxruntime_providers: tuple[str, ...]
    problems: Mapping[str, str] = field(default_factory=dict)
    openvino_capabilities: tuple[str, ...] = ()
    cpu_features: tuple[str, ...] = ()

    @property
    def lacks_gpu(self) -> str:
        """What to say of a machine without a GPU: most people who read it have none and want none, so that only doctor
        has the advice for one."""
        return "no GPU found" if cuda.NO_DRIVER in self.gpu_problem else self.gpu_problem

    def version_of(self, library: str) -> str | None:
        """Of one of :attr:`versions`, or of any other installed distribution; None if it cannot be used."""
        return self.versions.get(library) if library in _LIBRARIES else _distribution_version(library)


def examine_machine(device: int = 0) -> Machine:
    """Looks at this machine and at its GPU ``device``; never raises."""
    versions: dict[str, str | None] = {}
    problems: dict[str, str] = {}
    for library in _LIBRARIES:
        versions[library], problem = _examine_library(library)
        if problem:
            problems[library] = problem
    gpu, gpu_problem = _find_gpu(versions["cuda-bindings"] is not None, device)
    providers = _told(lambda: _import_quietly("onnxruntime").get_available_providers())
    capabilities = _told(lambda: cpu_capabilities(_import_quietly("openvino")))
    system = f"{platform.system().lower()}-{platform.machine()}"
    return Machine(system, gpu, gpu_problem, versions, providers, problems, capabilities, _cpu_features())


def _cpu_features() -> tuple[str, ...]:
    """Linux alone tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return tuple(feature for feature in CPU_FEATURES if feature in flags)


def library_version(library: str) -> str | None:
    """Version of a library that imports here, None if none does.

    Args:
        library: a key of ``Machine.versions``; others are looked up as installed distributions.
    """
    return _examine_library(library)[0] if library in _LIBRARIES else _distribution_version(library)


def _examine_library(library: str) -> tuple[str | None, str]:
    """Version (None if the library cannot be used), and what is wrong with an installation that does not import."""
    name, distributions = _LIBRARIES[library]
    installed = next((found for found in map(_distribution_version, distributions) if found), None)
    try:
        module = _import_quietly(name)
        # TensorRT's plans are bound to what is loaded, which may not be what the metadata says. A folder that an
        # uninstalled package leaves behind imports, too, but has no version.
        return (module.__version__ if library.startswith("tensorrt") else installed or module.__version__), ""
    except Exception as error:  # a broken library fails in any way it likes: ImportError, OSError, RuntimeError
        if installed is None:
            return None, ""
        return None, f"{library} {installed} is installed but does not import: {_first_line(error)}"


def _import_quietly(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_openvino() if name == "openvino" else importlib.import_module(name)


def _distribution_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _told(ask: Callable[[], Iterable[str]]) -> tuple[str, ...]:
    try:
        return tuple(ask())
    except Exception:  # not there, or such as a processor that OpenVINO does not know
        return ()


def _find_gpu(has_cuda_bindings: bool, device: int = 0) -> tuple[Gpu | None, str]:
    """The GPU of this index, or None and why."""
    try:
        devices = cuda.list_devices()
    except Exception as error:  # mostly a BackendError; but a look must not fail, however strange the driver
        if has_cuda_bindings:
            # The driver itself has spoken; nvidia-smi would name a GPU that CUDA cannot use.
            return None, getattr(error, "text", _first_line(error))
        devices = _ask_nvidia_smi()
        if not devices:
            seen = "nvidia-smi finds no GPU" if shutil.which("nvidia-smi") else cuda.NO_DRIVER
            return None, f"{seen}; {_first_line(error)}"
    if not 0 <= device < len(devices):
        return None, cuda.no_such_gpu(len(devices)) if devices else "the driver shows no GPU"
    return devices[device], ""


def _ask_nvidia_smi() -> list[Gpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run([program, *query], capture_output=True, text=True, timeout=20, check=True)
        return [_described(line) for line in done.stdout.splitlines()]
    except (OSError, subprocess.SubprocessError, KeyError, ValueError):
        return []


def _described(line: str) -> Gpu:
    name, capability, memory, driver = (part.strip() for part in line.rsplit(",", 3))
    amount, unit = memory.split()
    return Gpu(name, capability, int(amount) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit], driver)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
