"""What engines are built for: which library, which GPUs; and what this machine can build at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from ...runtime.backends.tensorrt.library import load_library
from ...runtime.bundle.engine_sets import FLAVOURS
from ...runtime.errors import BackendError, GtrError, UsageError
from ...runtime.machine.examine import Machine

AHEAD_OF_TIME = ("8.6", "8.9", "12.0")
"""What TensorRT-RTX builds for where it is not told and there is no GPU that it supports."""


class NeedsGpuError(GtrError):
    """TensorRT measures its kernels on the GPU that will run them."""


@dataclass(frozen=True)
class Target:
    """What engines are built for.

    Attributes:
        flavour, version, trt: the library.
        compute_capabilities: what the engines may run on, in rising order.
        gpu: the GPU model that they are bound to; None where they fit every GPU of a listed compute capability.
        build_gpu: the GPU that kernels are measured on; None for engines built ahead of time.
        hardware_compatible: also for compute capability 8.0 and later.
        inspectable: there is a GPU here that can open the engines.
    """

    flavour: str
    version: str
    trt: ModuleType
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    build_gpu: str | None
    system: str
    hardware_compatible: bool
    inspectable: bool


def choose_target(
    flavour: str, compute_capabilities: Sequence[str], hardware_compatible: bool, machine: Machine, command: str
) -> Target:
    """What to build for on this machine; ``command`` is what to run on another one, for the error line.

    Raises:
        UsageError: unknown flavour or compute capability, or an option of the other flavour.
        NeedsGpuError: TensorRT without a GPU.
        BackendError: the library is missing or does not load.
    """
    if flavour not in FLAVOURS:
        raise UsageError(f"engine {flavour!r} is not one of {', '.join(FLAVOURS)}")
    if flavour == "tensorrt":
        if compute_capabilities:
            raise UsageError("--compute-capability is for tensorrt-rtx; tensorrt builds for the GPU that it runs on")
        if machine.gpu is None:
            raise NeedsGpuError(
                f"building TensorRT engines needs the GPU that will run them ({machine.gpu_problem}); "
                f"run {command} on the target"
            )
        trt = load_library(flavour)
        name, capability = machine.gpu.name, machine.gpu.compute_capability
        bound = None if hardware_compatible else name
        version = trt.__version__
        return Target(flavour, version, trt, (capability,), bound, name, machine.system, hardware_compatible, True)
    if hardware_compatible:
        raise UsageError("--hardware-compatible is for tensorrt; tensorrt-rtx has --compute-capability 8.6,8.9,12.0")
    trt = load_library(flavour)
    known = supported_capabilities(trt)
    here = machine.gpu.compute_capability if machine.gpu is not None else None
    if not compute_capabilities:
        compute_capabilities = [here] if here in known else [item for item in AHEAD_OF_TIME if item in known]
    if unknown := [item for item in compute_capabilities if item not in known]:
        raise UsageError(
            f"TensorRT-RTX {trt.__version__} does not build for compute capability {', '.join(unknown)}, "
            f"only for {', '.join(known)}"
        )
    wanted = tuple(item for item in known if item in compute_capabilities)
    return Target(flavour, trt.__version__, trt, wanted, None, None, machine.system, False, here in wanted)


def supported_capabilities(trt: ModuleType) -> tuple[str, ...]:
    """The compute capabilities that a TensorRT-RTX can build for, in rising order: ``SM120`` is 12.0."""
    names = [match for name in dir(trt.ComputeCapability) if (match := re.fullmatch(r"SM(\d+)(\d)", name))]
    return tuple(f"{major}.{minor}" for major, minor in sorted((int(m[1]), int(m[2])) for m in names))


def choose_engine(machine: Machine) -> tuple[str, str]:
    """The engine library that ``--engine auto`` means on this machine, and one line why."""
    if machine.gpu is None:
        found = machine.lacks_gpu
        return "onnxruntime", found if found != machine.gpu_problem else f"no GPU ({found})"
    gpu = f"{machine.gpu.name}, compute capability {machine.gpu.compute_capability}"
    if machine.versions.get("tensorrt") is not None:
        return "tensorrt", f"TensorRT {machine.versions['tensorrt']} and {gpu}"
    if machine.versions.get("tensorrt-rtx") is not None:
        try:
            known = supported_capabilities(load_library("tensorrt-rtx"))
        except BackendError as error:
            return "onnxruntime", str(error)
        if machine.gpu.compute_capability in known:
            return "tensorrt-rtx", f"TensorRT-RTX {machine.versions['tensorrt-rtx']} and {gpu}"
        return "onnxruntime", f"{gpu}, which TensorRT-RTX does not support, and TensorRT is not installed"
    return "onnxruntime", f"{gpu}, but neither TensorRT nor TensorRT-RTX is installed"
