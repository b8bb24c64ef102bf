"""Which engine library runs a bundle. Each is imported only when it is opened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..bundle.engine_sets import FLAVOURS
from ..errors import BackendError, UsageError
from ..machine.examine import INSTALL
from ..models.graphs import NETWORKS
from .openvino.library import version_problem
from .protocol import CUDA_GRAPH_MODES, Backend

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from ..machine.examine import Machine

BACKENDS = ("onnxruntime", "openvino", *FLAVOURS, "torch")
PROVIDERS = ("auto", "cpu", "cuda")

ENTRY_POINTS = "gtr_deploy.backends"
"""Entry point group of backends that are not part of the runtime."""


@dataclass(frozen=True)
class BackendOptions:
    """What a user can say about the backend.

    Attributes:
        backend: one of ``BACKENDS``, or ``auto``: see :func:`choose_backend`.
        provider: where onnxruntime and torch compute, one of ``PROVIDERS``; auto is CUDA where it can be used.
        threads: threads of one call on the CPU; the library's default if None.
        device: index of the GPU.
        cuda_graph: one of ``CUDA_GRAPH_MODES``; onnxruntime and torch only tell ``off`` from the rest; openvino has
            none.
        precision: of the torch backend; the bundle's if None.
    """

    backend: str = "auto"
    provider: str = "auto"
    threads: int | None = None
    device: int = 0
    cuda_graph: str = "auto"
    precision: str | None = None


def choose_backend(bundle: Bundle, machine: Machine) -> tuple[str, str]:
    """The backend that ``auto`` means, and one line why.

    An engine set of the bundle that can run here, TensorRT before TensorRT-RTX; else ONNX Runtime on CUDA if it can;
    else the CPU, where OpenVINO runs what ONNX Runtime cannot, or is not there to run.
    """
    from ..bundle.engine_sets import refusal

    refused = ""
    for flavour in FLAVOURS:
        for engines in bundle.engine_sets:
            if engines.flavour != flavour:
                continue
            reason = refusal(engines, bundle, machine)
            if reason is None:
                return flavour, f"the bundle's engines {engines.key} run here"
            refused = refused or f"engines {engines.key} cannot run here ({reason}); "
    if _provider(machine) == "cuda":
        assert machine.gpu is not None
        return "onnxruntime", f"{refused or 'the bundle has no engines; '}its CUDA provider runs on {machine.gpu.name}"
    missing = machine.gpu_problem if machine.gpu is None else "this onnxruntime has no CUDA provider"
    found = machine.versions.get("openvino")
    if found and version_problem(found) is None and openvino_refusal(bundle) is None:
        if cpu_provider_refusal(bundle):
            because = f"OpenVINO runs {bundle.precision} bundles there, ONNX Runtime does not"
            if "BF16" not in machine.openvino_capabilities:
                because += "; this CPU has no bfloat16, float32 takes its place"
            return "openvino", f"{refused}on the CPU: {missing}; {because}"
        if machine.versions.get("onnxruntime") is None:
            return "openvino", f"{refused}on the CPU: {missing}; ONNX Runtime is not installed"
    return "onnxruntime", f"{refused}on the CPU: {missing}"


def _machine() -> Machine:
    from ..machine.examine import examine_machine

    return examine_machine()


def _provider(machine: Machine) -> str:
    return "cuda" if machine.gpu is not None and "CUDAExecutionProvider" in machine.onnxruntime_providers else "cpu"


def cpu_provider_refusal(bundle: Bundle) -> str | None:
    """Why ONNX Runtime's CPU provider cannot run a bundle, and what can be done; None if it can."""
    if bundle.precision != "bf16":
        return None
    return (
        "ONNX Runtime's CPU provider has no bfloat16 matrix product; use an fp32 or fp16 bundle "
        f"(gtr-export build --model {bundle.architecture.name} --precision fp16), or OpenVINO "
        f"({INSTALL['openvino']})"
    )


def openvino_refusal(bundle: Bundle) -> str | None:
    """Why OpenVINO cannot run a bundle, and what can be done; None if it can."""
    if bundle.precision != "fp8":
        return None
    return (
        "OpenVINO rounds to fp8 twice, so that 3 in 1,000 values differ from what the graph says; evaluate it with "
        "--backend onnxruntime --provider cpu"
    )


def resolve_backend(bundle: Bundle, options: BackendOptions) -> tuple[BackendOptions, str | None]:
    """The options with every ``auto`` that depends on the machine replaced, and why; None if the user chose.

    Raises:
        BackendError: unknown backend, provider or CUDA graph mode.
        UsageError: options that do not go together.
    """
    for what, value, known in (
        ("backend", options.backend, ("auto", *BACKENDS)),
        ("provider", options.provider, PROVIDERS),
        ("CUDA graph mode", options.cuda_graph, CUDA_GRAPH_MODES),
    ):
        if value not in known:
            raise BackendError(f"{what} {value!r} is not one of {', '.join(known)}")
    why = None
    if options.backend == "auto" and options.provider != "auto":
        options, why = replace(options, backend="onnxruntime"), f"--provider {options.provider} is ONNX Runtime's"
    elif options.backend == "auto":
        machine = _machine()
        name, why = choose_backend(bundle, machine)
        options = replace(options, backend=name, provider=_provider(machine) if name == "onnxruntime" else "auto")
    elif options.backend == "onnxruntime" and options.provider == "auto":
        options = replace(options, provider=_provider(_machine()))
    if options.backend == "onnxruntime" and options.provider == "cpu" and bundle.precision == "fp8":
        why = (f"{why}; " if why else "") + "fp8 on a CPU is an evaluation at the cost of fp32, not a deployment"
    if options.backend in (*FLAVOURS, "openvino") and options.provider != "auto":
        raise UsageError(f"--provider {options.provider} is for onnxruntime and torch, not for {options.backend}")
    if options.backend == "openvino":
        if options.device:
            raise UsageError(f"--device {options.device} is the index of a GPU; openvino runs on the CPU")
        if options.cuda_graph not in ("auto", "off"):
            raise UsageError(f"--cuda-graph {options.cuda_graph} is for GPUs; openvino runs on the CPU")
    if options.precision is not None and options.backend != "torch":
        raise UsageError(f"precision {options.precision}: only torch has a choice, {options.backend} runs the bundle's")
    return options, why


def open_backend(bundle: Bundle, options: BackendOptions, checksums: bool = True) -> Backend:
    """Opens a bundle with the chosen engine library.

    Args:
        checksums: compare every file's SHA-256 with the manifest (sizes always are).

    Raises:
        BundleError: a file of the bundle is not sound.
        BackendError: the engine library is missing, cannot run here, or refuses a graph.
        UsageError: options that do not go together.
    """
    options, _ = resolve_backend(bundle, options)
    if options.backend in FLAVOURS:
        from .tensorrt.backend import open_tensorrt

        return open_tensorrt(bundle, options.backend, options.device, options.cuda_graph, checksums)
    if options.backend == "torch":
        return _open_torch(bundle, options)
    if options.backend == "openvino":
        if reason := openvino_refusal(bundle):
            raise BackendError(reason)
        from .openvino.backend import OpenVinoBackend

        paths = bundle.graph_paths(checksums, target="cpu")
        return OpenVinoBackend({kind: paths[kind] for kind in NETWORKS}, options.threads)
    if options.provider == "cpu" and (reason := cpu_provider_refusal(bundle)):
        raise BackendError(reason)
    from .onnxruntime.backend import OnnxRuntimeBackend

    graphs = options.provider == "cuda" and options.cuda_graph != "off"
    paths = bundle.graph_paths(checksums, target="cpu" if options.provider == "cpu" else "tensorrt")
    return OnnxRuntimeBackend(
        paths,
        options.threads,
        options.provider,
        options.device,
        cuda_graphs=graphs,
        optimised=not (options.provider == "cpu" and bundle.precision == "fp8"),
    )


def _open_torch(bundle: Bundle, options: BackendOptions) -> Backend:
    """Through its entry point: the runtime imports nothing of the export side."""
    from ..machine.plugins import load_plugin

    missing = "the torch backend comes with the export side; pip install 'gtr-deploy[export]'"
    open_torch = load_plugin(ENTRY_POINTS, "torch", missing, BackendError)
    device = options.provider
    if device == "cuda" or (device == "auto" and options.device):
        device = f"cuda:{options.device}"
    graphs = options.cuda_graph != "off"
    return open_torch(bundle, device=device, precision=options.precision, cuda_graphs=graphs, threads=options.threads)
