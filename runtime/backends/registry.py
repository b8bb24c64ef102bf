"""The table of backends: one row each, which drives the automatic choice, doctor, --help, bench and verify.

A row of another package is an entry point of the group ``gtr_deploy.backends`` that loads to a ``BackendRow``.
Libraries are imported only when a row is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ..bundle.engine_sets import rebuild_command, refusal
from ..errors import BackendError, BundleError
from ..machine.examine import INSTALL
from ..models.graphs import NETWORKS
from .protocol import Backend
from .row import BackendOptions, BackendRow

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from ..machine.examine import Machine

ENTRY_POINTS = "gtr_deploy.backends"


def _open_onnxruntime(bundle: Bundle, options: BackendOptions, checksums: bool) -> Backend:
    from .onnxruntime.backend import OnnxRuntimeBackend

    on_cpu = options.provider == "cpu"
    return OnnxRuntimeBackend(
        bundle.graph_files(checksums, target="cpu" if on_cpu else "tensorrt"),
        options.threads,
        options.provider,
        options.device,
        cuda_graphs=not on_cpu and options.cuda_graph != "off",
        optimised=not (on_cpu and bundle.precision == "fp8"),
    )


def _open_openvino(bundle: Bundle, options: BackendOptions, checksums: bool) -> Backend:
    from .openvino.backend import OpenVinoBackend

    graphs = bundle.graph_files(checksums, target="cpu")
    return OpenVinoBackend({kind: graphs[kind] for kind in NETWORKS if kind in graphs}, options.threads)


def _open_tensorrt(bundle: Bundle, options: BackendOptions, checksums: bool) -> Backend:
    from .tensorrt.backend import open_tensorrt

    return open_tensorrt(bundle, options.backend, options.device, options.cuda_graph, checksums)


def lacks_cuda_provider(machine: Machine) -> str:
    """Why ONNX Runtime cannot use CUDA although there is a GPU; empty if it can."""
    if "CUDAExecutionProvider" in machine.onnxruntime_providers:
        return ""
    # Both distributions install the same module: the CPU one has to go first.
    return "this onnxruntime has no CUDA provider; pip uninstall -y onnxruntime && " + INSTALL["onnxruntime-cuda"]


def _cuda_refuses(bundle: Bundle, machine: Machine) -> str:
    if bundle.precision != "bf16" or not bundle.architecture.decoder.has_weights:
        return ""
    return (
        "ONNX Runtime's CUDA provider has failed on bfloat16 convolutions, which the VAE has (onnxruntime #25740); "
        f"{rebuild_command(bundle, 'tensorrt')}, or "
        f"gtr-export build --model {bundle.architecture.name} --precision fp16"
    )


OPENVINO_PRECISIONS = ("fp32", "int8")
"""What OpenVINO was measured to be faster at than ONNX Runtime, on a CPU with VNNI and without AMX."""


def _openvino_rank(bundle: Bundle, machine: Machine) -> float:
    """Measured, one and two threads (docs/engines.md). EPYC with AVX-512 VNNI: int8 1.06 to 2.6 times as fast as ONNX
    Runtime, fp32 1.1 to 1.26 times. AVX2 alone: int8 1.8 times as slow, fp32 a draw. Xeon with AMX: int8 1.06 to 1.65
    times as slow. fp16 was not measured."""
    features = set(machine.cpu_features)
    faster = features & {"avx512_vnni", "avx_vnni"} and "amx_int8" not in features
    return 60 if faster and bundle.precision in OPENVINO_PRECISIONS else 40


def _openvino_because(bundle: Bundle, machine: Machine) -> str:
    if ONNXRUNTIME_CPU.unsupported.get(bundle.precision):
        because = f"OpenVINO runs {bundle.precision} bundles there, ONNX Runtime does not"
        return because + ("" if _has_bfloat16(machine) else "; this CPU has no bfloat16, float32 takes its place")
    if ONNXRUNTIME_CPU.problem(machine):
        return "ONNX Runtime is not installed"
    faster = _openvino_rank(bundle, machine) > 50
    return f"OpenVINO was faster than ONNX Runtime with {bundle.precision} on CPUs with VNNI" if faster else ""


def _has_bfloat16(machine: Machine) -> bool:
    return "BF16" in machine.openvino_capabilities


def _openvino_what(machine: Machine, bundle: Bundle | None) -> str:
    bfloat16 = "bfloat16" if _has_bfloat16(machine) else "float32, since this CPU has no bfloat16"
    return f"openvino {machine.versions.get('openvino')}, bf16 bundles in {bfloat16}"


RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""TensorRT-RTX has kernels for these alone: consumer and workstation GPUs, not the data center's 9.0 and 10.0."""


def engine_refusals(bundle: Bundle, machine: Machine, flavour: str) -> dict[str, str]:
    """Key of each engine set of a flavour, newest first, to why it cannot run here, damaged files included; empty if
    it can."""
    found = {}
    for engines in reversed([engines for engines in bundle.engine_sets if engines.flavour == flavour]):
        reason = refusal(engines, bundle, machine)
        if reason is None:
            try:
                bundle.engine_paths(engines, checksums=False)
            except BundleError as error:
                reason = str(error)
        found[engines.key] = reason or ""
    return found


def _tensorrt_row(flavour: str, oldest: tuple[int, ...], rank: float) -> BackendRow:
    """``oldest`` has the API that the code uses; tests/export/test_tensorrt_api.py holds it to newer ones."""

    def lacks(machine: Machine) -> str:
        assert machine.gpu is not None
        if machine.versions.get("cuda-bindings") is None:
            return f"{machine.problems.get('cuda-bindings') or 'cuda-bindings is not installed'}; {INSTALL[flavour]}"
        here = machine.gpu.compute_capability
        if flavour == "tensorrt-rtx" and here not in RTX_CAPABILITIES:
            return f"{flavour} runs on compute capability {', '.join(RTX_CAPABILITIES)}, not on {here}; use tensorrt"
        return ""

    def refuses(bundle: Bundle, machine: Machine) -> str:
        refusals = engine_refusals(bundle, machine, flavour)
        if not refusals:
            return f"the bundle has no {flavour} engines; {rebuild_command(bundle, flavour)}"
        return "" if "" in refusals.values() else next(iter(refusals.values()))

    def what(machine: Machine, bundle: Bundle | None) -> str:
        found = f"{flavour} {machine.versions.get(flavour)}"
        if bundle is None:
            return f"{found}; gtr-export engine BUNDLE --engine {flavour} builds engines"
        runnable = [key for key, reason in engine_refusals(bundle, machine, flavour).items() if not reason]
        return f"{found}, {', '.join(runnable)}"

    return BackendRow(
        flavour,
        _open_tensorrt,
        what=what,
        library=flavour,
        oldest=oldest,
        install=INSTALL[flavour],
        gpu=True,
        # Its compiler needs no GPU, so that the engines of other machines can be built on this one.
        without_gpu="; it can still build engines for other machines" if flavour == "tensorrt-rtx" else "",
        reads_graphs=False,
        lacks=lacks,
        refuses=refuses,
        rank=lambda bundle, machine: rank,
    )


ONNXRUNTIME_CPU = BackendRow(
    "onnxruntime",
    _open_onnxruntime,
    what=lambda machine, bundle: f"onnxruntime {machine.versions.get('onnxruntime')}",
    provider="cpu",
    library="onnxruntime",
    install=INSTALL["onnxruntime"],
    unsupported={
        "bf16": "ONNX Runtime's CPU provider has no bfloat16 matrix product; use an fp32 or fp16 bundle "
        f"(gtr-export build --model {{model}} --precision fp16), or OpenVINO ({INSTALL['openvino']})"
    },
    rank=lambda bundle, machine: 50,
)

ROWS: tuple[BackendRow, ...] = (
    ONNXRUNTIME_CPU,
    BackendRow(
        "onnxruntime",
        _open_onnxruntime,
        what=lambda machine, bundle: f"onnxruntime {machine.versions.get('onnxruntime')}, CUDA provider",
        provider="cuda",
        library="onnxruntime",
        install=INSTALL["onnxruntime-cuda"],
        gpu=True,
        lacks=lacks_cuda_provider,
        refuses=_cuda_refuses,
        rank=lambda bundle, machine: 80,
    ),
    BackendRow(
        "openvino",
        _open_openvino,
        what=_openvino_what,
        library="openvino",
        # Older versions cannot run graphs with axes of size 0, which the first AR step of every plan has.
        oldest=(2026, 3),
        install=INSTALL["openvino"],
        unsupported={
            "fp8": "OpenVINO rounds to fp8 twice, so that 3 in 1,000 values differ from what the graph says; "
            "evaluate it with --backend onnxruntime --provider cpu"
        },
        rank=_openvino_rank,
        because=_openvino_because,
    ),
    _tensorrt_row("tensorrt", (10, 12), 100),
    _tensorrt_row("tensorrt-rtx", (1, 7), 90),
)
"""The runtime's own backends; other packages' come with :func:`backend_rows`."""


def backend_rows() -> tuple[BackendRow, ...]:
    """Every row, those of other packages last. One that cannot be loaded is a row that says so."""
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    return (*ROWS, *(_loaded(point.name, point.load) for point in points))


def _loaded(name: str, load: Callable[[], object]) -> BackendRow:
    try:
        row = load()
        if name in (row.name for row in ROWS):
            reason = "an entry point cannot have the name of a backend of the runtime"
        elif isinstance(row, BackendRow):
            return _guarded(replace(row, name=name))
        else:
            reason = f"its entry point gives a {type(row).__name__}, not a BackendRow"
    except Exception as error:  # somebody else's code; it must not take doctor and the other backends with it
        reason = f"its entry point cannot be loaded: {_told(error)}"

    def refused(*_: object) -> Backend:
        raise BackendError(f"backend {name}: {reason}")

    return BackendRow(name, refused, lacks=lambda machine: reason)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _guarded(row: BackendRow) -> BackendRow:
    """A row whose questions always have an answer: one that raises refuses, has no rank and says nothing."""

    def asked(question: Callable[..., Any], answer: Callable[[Exception], Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return question(*arguments)
            except Exception as error:  # somebody else's code
                return answer(error)

        return call

    def refusing(error: Exception) -> str:
        return f"its row fails: {_told(error)}"

    return replace(
        row,
        lacks=asked(row.lacks, refusing),
        refuses=asked(row.refuses, refusing),
        rank=asked(row.rank, lambda error: None),
        because=asked(row.because, lambda error: ""),
        what=row.what if isinstance(row.what, str) else asked(row.what, refusing),
    )


def backend_names() -> tuple[str, ...]:
    """What ``--backend`` takes, ``auto`` first."""
    return ("auto", *dict.fromkeys(row.name for row in backend_rows()))
