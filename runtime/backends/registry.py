"""The table of backends: one row each, which drives the automatic choice, doctor, --help, bench and verify.

A row of another package is an entry point of the group ``gtr_deploy.backends`` that loads to a :class:`BackendRow`.
Libraries are imported only when a row is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ..bundle.engine_sets import FLAVOURS, rebuild_command, refusal
from ..errors import BackendError, BundleError, UsageError
from ..machine.examine import INSTALL, examine_machine
from ..models.graphs import NETWORKS
from .protocol import CUDA_GRAPH_MODES, Backend

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from ..machine.examine import Machine

PROVIDERS = ("auto", "cpu", "cuda")

ENTRY_POINTS = "gtr_deploy.backends"
"""Entry point group of rows that are not part of the runtime."""

ELSEWHERE = {"torch": "the torch backend comes with the export side; pip install 'gtr-deploy[export]'"}
"""Backends that are well known and come with another package."""


@dataclass(frozen=True)
class BackendOptions:
    """What a user can say about the backend.

    Attributes:
        backend: the name of a row, or ``auto``: see :func:`choose_backend`.
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


def _nothing(*_: object) -> str:
    return ""


@dataclass(frozen=True)
class BackendRow:
    """One backend.

    Attributes:
        name: what ``--backend`` takes.
        open: (bundle, options, compare checksums) to the backend.
        what: what it is, one line for doctor; (machine, bundle or None) to it where that depends.
        provider: ``cpu`` or ``cuda`` where a library has a row for each.
        library: that it needs, a key of ``Machine.versions``; None if :attr:`lacks` knows alone.
        oldest: version of the library, such as (2026, 3).
        install: the line that installs it.
        gpu: it needs one.
        without_gpu: what it is still good for without one, a clause.
        reads_graphs: it runs the bundle's graphs, not engines or a checkpoint.
        unsupported: precision to what is wrong with it and what can be done; ``{model}`` is the model's name.
        lacks: why it runs nothing on a machine whose library and GPU are there; empty if it does.
        refuses: why it does not run a bundle on a machine that lacks nothing; empty if it does.
        rank: how far up it stands when nobody chooses; None: it is never taken unasked.
        because: (bundle, machine) to a clause why it is taken unasked; may be empty.
    """

    name: str
    open: Callable[[Bundle, BackendOptions, bool], Backend]
    what: str | Callable[[Machine, Bundle | None], str] = ""
    provider: str = ""
    library: str | None = None
    oldest: tuple[int, ...] = ()
    install: str = ""
    gpu: bool = False
    without_gpu: str = ""
    reads_graphs: bool = True
    unsupported: Mapping[str, str] = field(default_factory=dict)
    lacks: Callable[[Machine], str] = _nothing
    refuses: Callable[[Bundle, Machine], str] = _nothing
    rank: Callable[[Bundle, Machine], float | None] = lambda bundle, machine: None
    because: Callable[[Bundle, Machine], str] = _nothing

    @property
    def label(self) -> str:
        """Name, with the provider where there are several: ``onnxruntime cpu``."""
        return f"{self.name} {self.provider}".strip()

    def problem(self, machine: Machine) -> str:
        """Why it runs nothing on this machine, and the line that mends it; empty if it can."""
        if self.library is not None:
            found = machine.versions.get(self.library)
            if found is None:
                return f"{machine.problems.get(self.library) or f'{self.library} is not installed'}; {self.install}"
            if _numbers(found) < self.oldest:
                oldest = ".".join(map(str, self.oldest))
                upgrade = self.install.replace("install", "install --upgrade", 1)
                return f"{self.library} {found} is too old, {oldest} is needed; {upgrade}"
        if self.gpu and machine.gpu is None:
            return (machine.gpu_problem or "no GPU was found") + self.without_gpu
        return self.lacks(machine)

    def refusal(self, bundle: Bundle, machine: Machine) -> str:
        """Why it does not run this bundle on this machine; empty if it does."""
        return self.problem(machine) or self.precision_problem(bundle) or self.refuses(bundle, machine)

    def precision_problem(self, bundle: Bundle) -> str:
        """Why it does not run the bundle's precision; empty if it does."""
        return self.unsupported.get(bundle.precision, "").format(model=bundle.architecture.name)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading whole numbers of a version."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


# --- the rows ---------------------------------------------------------------------------------------------------------


def _open_onnxruntime(provider: str) -> Callable[[Bundle, BackendOptions, bool], Backend]:
    def open_(bundle: Bundle, options: BackendOptions, checksums: bool) -> Backend:
        from .onnxruntime.backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(
            bundle.graph_paths(checksums, target="cpu" if provider == "cpu" else "tensorrt"),
            options.threads,
            provider,
            options.device,
            cuda_graphs=provider == "cuda" and options.cuda_graph != "off",
            optimised=not (provider == "cpu" and bundle.precision == "fp8"),
        )

    return open_


def _open_openvino(bundle: Bundle, options: BackendOptions, checksums: bool) -> Backend:
    from .openvino.backend import OpenVinoBackend

    paths = bundle.graph_paths(checksums, target="cpu")
    return OpenVinoBackend({kind: paths[kind] for kind in NETWORKS}, options.threads)


def _open_tensorrt(flavour: str) -> Callable[[Bundle, BackendOptions, bool], Backend]:
    def open_(bundle: Bundle, options: BackendOptions, checksums: bool) -> Backend:
        from .tensorrt.backend import open_tensorrt

        return open_tensorrt(bundle, flavour, options.device, options.cuda_graph, checksums)

    return open_


def _lacks_cuda_provider(machine: Machine) -> str:
    if "CUDAExecutionProvider" in machine.onnxruntime_providers:
        return ""
    # Both distributions install the same module: the CPU one has to go first.
    return "this onnxruntime has no CUDA provider; pip uninstall -y onnxruntime && " + INSTALL["onnxruntime-cuda"]


def _openvino_rank(bundle: Bundle, machine: Machine) -> float:
    return OPENVINO_FIRST if has_vnni(machine) and bundle.precision in FASTER_ON_VNNI else 40


def has_vnni(machine: Machine) -> bool:
    """Whether the CPU multiplies 8-bit integers in one instruction."""
    return bool({"avx512_vnni", "avx_vnni"} & set(machine.cpu_features))


FASTER_ON_VNNI = ("int8",)
OPENVINO_FIRST = 60


def _openvino_because(bundle: Bundle, machine: Machine) -> str:
    if ONNXRUNTIME_CPU.unsupported.get(bundle.precision):
        because = f"OpenVINO runs {bundle.precision} bundles there, ONNX Runtime does not"
        return because + ("" if _has_bfloat16(machine) else "; this CPU has no bfloat16, float32 takes its place")
    if ONNXRUNTIME_CPU.problem(machine):
        return "ONNX Runtime is not installed"
    return f"OpenVINO was faster than ONNX Runtime with {bundle.precision} on CPUs with VNNI"


def _has_bfloat16(machine: Machine) -> bool:
    return "BF16" in machine.openvino_capabilities


def _openvino_what(machine: Machine, bundle: Bundle | None) -> str:
    bfloat16 = "bfloat16" if _has_bfloat16(machine) else "float32, since this CPU has no bfloat16"
    return f"openvino {machine.versions.get('openvino')}, bf16 bundles in {bfloat16}"


def _tensorrt_lacks(flavour: str) -> Callable[[Machine], str]:
    def lacks(machine: Machine) -> str:
        assert machine.gpu is not None
        if machine.versions.get("cuda-bindings") is None:
            return f"{machine.problems.get('cuda-bindings') or 'cuda-bindings is not installed'}; {INSTALL[flavour]}"
        here = machine.gpu.compute_capability
        if flavour == "tensorrt-rtx" and here not in RTX_CAPABILITIES:
            return f"{flavour} runs on compute capability {', '.join(RTX_CAPABILITIES)}, not on {here}; use tensorrt"
        return ""

    return lacks


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


def _tensorrt_refuses(flavour: str) -> Callable[[Bundle, Machine], str]:
    def refuses(bundle: Bundle, machine: Machine) -> str:
        refusals = engine_refusals(bundle, machine, flavour)
        if not refusals:
            return f"the bundle has no {flavour} engines; {rebuild_command(bundle, flavour)}"
        return "" if "" in refusals.values() else next(iter(refusals.values()))

    return refuses


def _tensorrt_what(flavour: str) -> Callable[[Machine, Bundle | None], str]:
    def what(machine: Machine, bundle: Bundle | None) -> str:
        found = f"{flavour} {machine.versions.get(flavour)}"
        if bundle is None:
            return f"{found}; gtr-export engine BUNDLE --engine {flavour} builds engines"
        runnable = [key for key, reason in engine_refusals(bundle, machine, flavour).items() if not reason]
        return f"{found}, {', '.join(runnable)}"

    return what


ONNXRUNTIME_CPU = BackendRow(
    "onnxruntime",
    _open_onnxruntime("cpu"),
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
        _open_onnxruntime("cuda"),
        what=lambda machine, bundle: f"onnxruntime {machine.versions.get('onnxruntime')}, CUDA provider",
        provider="cuda",
        library="onnxruntime",
        install=INSTALL["onnxruntime-cuda"],
        gpu=True,
        lacks=_lacks_cuda_provider,
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
    *(
        BackendRow(
            flavour,
            _open_tensorrt(flavour),
            what=_tensorrt_what(flavour),
            library=flavour,
            # The oldest version whose API the code uses; tests/export/test_tensorrt_api.py holds it to newer ones.
            oldest=oldest,
            install=INSTALL[flavour],
            gpu=True,
            # Its compiler needs no GPU, so that the engines of other machines can be built on this one.
            without_gpu="; it can still build engines for other machines" if flavour == "tensorrt-rtx" else "",
            reads_graphs=False,
            lacks=_tensorrt_lacks(flavour),
            refuses=_tensorrt_refuses(flavour),
            rank=lambda bundle, machine, rank=rank: rank,
        )
        for flavour, oldest, rank in (("tensorrt", (10, 12), 100), ("tensorrt-rtx", (1, 7), 90))
    ),
)
"""The runtime's own backends; other packages' come with :func:`backend_rows`."""


def backend_rows() -> tuple[BackendRow, ...]:
    """Every row, those of other packages last. One that cannot be loaded is a row that says so."""
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    return (*ROWS, *(_loaded(point.name, point.load) for point in points))


def _loaded(name: str, load: Callable[[], object]) -> BackendRow:
    try:
        row = load()
        if isinstance(row, BackendRow):
            return replace(row, name=name)
        reason = f"its entry point gives a {type(row).__name__}, not a BackendRow"
    except Exception as error:  # somebody else's code; it must not take doctor and the other backends with it
        reason = f"its entry point cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def refused(*_: object) -> Backend:
        raise BackendError(f"backend {name}: {reason}")

    return BackendRow(name, refused, lacks=lambda machine: reason)


def backend_names() -> tuple[str, ...]:
    """What ``--backend`` takes, ``auto`` first."""
    return ("auto", *dict.fromkeys(row.name for row in backend_rows()))


# --- choosing ---------------------------------------------------------------------------------------------------------


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
    if row.provider == "cuda" and machine.gpu is not None:
        return row.name, f"{note or 'the bundle has no engines; '}its CUDA provider runs on {machine.gpu.name}"
    missing = machine.gpu_problem if machine.gpu is None else "this onnxruntime has no CUDA provider"
    because = row.because(bundle, machine)
    return row.name, f"{note}on the CPU: {missing}" + (f"; {because}" if because else "")


def _row(options: BackendOptions) -> BackendRow:
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
    elif options.backend == "auto":
        name, why = choose_backend(bundle, examine_machine())
        options = replace(options, backend=name)
    if options.backend == "onnxruntime" and options.provider == "auto":
        machine = examine_machine()
        cuda = machine.gpu is not None and not _lacks_cuda_provider(machine)
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
    """Opens a bundle with the chosen engine library.

    Args:
        checksums: compare every file's SHA-256 with the manifest (sizes always are).

    Raises:
        BundleError: a file of the bundle is not sound.
        BackendError: the engine library is missing, cannot run here, or refuses a graph.
        UsageError: options that do not go together.
    """
    options, _ = resolve_backend(bundle, options)
    row = _row(options)
    if reason := row.precision_problem(bundle):
        raise BackendError(reason)
    return row.open(bundle, options, checksums)
