"""Which row of the table runs a bundle, and opening it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..bundle.engine_sets import FLAVOURS
from ..errors import BackendError, UsageError
from ..machine.cpu import thread_limit
from ..machine.examine import examine_machine, library_version
from .protocol import CUDA_GRAPH_MODES, Backend
from .registry import ONNXRUNTIME_CPU, ROWS, backend_names, backend_rows, engine_refusals, lacks_cuda_provider
from .row import PROVIDERS, BackendOptions, BackendRow

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from ..machine.examine import Machine

ELSEWHERE = {"torch": "the torch backend comes with the export side; pip install 'gtr-deploy[export]'"}
"""Backends that are well known and come with another package."""


def choose_backend(bundle: Bundle, machine: Machine) -> tuple[str, str]:
    """The backend that ``auto`` means, and one line why: the highest rank among the rows that can run the bundle here.

    ONNX Runtime on the CPU where none can: its error says what is missing.
    """
    ranked = [(row.rank(bundle, machine), row) for row in backend_rows()]
    able = [(rank, row) for rank, row in ranked if rank is not None and not row.refusal(bundle, machine)]
    row = max(able, key=lambda pair: pair[0])[1] if able else ONNXRUNTIME_CPU
    refusals = {flavour: engine_refusals(bundle, machine, flavour) for flavour in FLAVOURS}
    if row.name in FLAVOURS:
        key = next(key for key, reason in refusals[row.name].items() if not reason)
        return row.name, f"the bundle's engines {key} run here"
    refused = next((item for found in refusals.values() for item in found.items()), None)
    note = f"engines {refused[0]} cannot run here ({refused[1]}); " if refused else ""
    because = row.because(bundle, machine)
    if row not in ROWS:
        return row.name, note + (because or "its rank is the highest")
    if row.provider == "cuda" and machine.gpu is not None:
        return row.name, f"{note or 'the bundle has no engines; '}its CUDA provider runs on {machine.gpu.name}"
    # Where ONNX Runtime could use the GPU and does not, something else was wrong with its row.
    missing = "this onnxruntime has no CUDA provider"
    if machine.gpu is None:
        missing = machine.lacks_gpu
    if machine.gpu is not None and not lacks_cuda_provider(machine):
        missing = next(row.refusal(bundle, machine) for row in ROWS if row.provider == "cuda")
    return row.name, f"{note}on the CPU: {missing}" + (f"; {because}" if because else "")


def row_of(options: BackendOptions) -> BackendRow:
    """The row of a backend that has been resolved."""
    rows = [row for row in backend_rows() if row.name == options.backend]
    return next((row for row in rows if row.provider == options.provider), rows[0])


def resolve_backend(bundle: Bundle, options: BackendOptions) -> tuple[BackendOptions, str | None]:
    """The options with every ``auto`` that depends on the machine replaced, and why; None if the user chose.

    Raises:
        BackendError: unknown backend, provider or CUDA graph mode.
        UsageError: options that do not go together.
    """
    names = backend_names()
    if options.backend in ELSEWHERE and options.backend not in names:
        raise BackendError(ELSEWHERE[options.backend])
    for what, value, known in (
        ("backend", options.backend, names),
        ("provider", options.provider, PROVIDERS),
        ("CUDA graph mode", options.cuda_graph, CUDA_GRAPH_MODES),
    ):
        if value not in known:
            raise BackendError(f"{what} {value!r} is not one of {', '.join(known)}")
    why = None
    if options.backend == "auto" and options.provider != "auto":
        options, why = replace(options, backend="onnxruntime"), f"--provider {options.provider} is ONNX Runtime's"
    depends = options.backend == "auto" or (options.backend, options.provider) == ("onnxruntime", "auto")
    machine = examine_machine(options.device) if depends else None
    if machine is not None and machine.gpu is None and options.device:
        raise BackendError(f"--device {options.device} is the index of a GPU: {machine.gpu_problem}")
    if machine is not None and options.backend == "auto":
        name, why = choose_backend(bundle, machine)
        options = replace(options, backend=name)
    if machine is not None and options.backend == "onnxruntime" and options.provider == "auto":
        cuda = machine.gpu is not None and not lacks_cuda_provider(machine)
        options = replace(options, provider="cuda" if cuda else "cpu")
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
    """Opens a bundle with the chosen engine library; ``checksums`` compares SHA-256, sizes always are compared.

    Raises:
        BundleError: a file of the bundle is not sound.
        BackendError: the engine library is missing, cannot run here, or refuses a graph.
        UsageError: options that do not go together.
    """
    options, _ = resolve_backend(bundle, options)
    if options.threads is None:
        options = replace(options, threads=thread_limit())
    row = row_of(options)
    found = library_version(row.library) if row.library and row.oldest else None
    if reason := (found and row.age_problem(found)) or row.precision_problem(bundle):
        raise BackendError(reason)
    return row.open(bundle, options, checksums)
