"""Builds the engine of one graph: parse, configure, build, look at what came out. Runs where there is no torch or onnx.

Polygraphy makes the profiles and the configuration, for both flavours. The network is parsed directly, so that every
parser error can be told with its node, and built directly, because Polygraphy takes a cancelled build for a failed one.
"""

from __future__ import annotations

import hashlib
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...runtime.backends.tensorrt.library import LogCollector, library_log
from ...runtime.bundle.engine_sets import FLAVOURS
from ...runtime.bundle.graph_file import GraphFile
from ...runtime.commands.console import Phases, Reporter
from ...runtime.commands.stop import raise_for
from ...runtime.errors import BackendError
from ...runtime.files import atomic_path, cache_dir
from ...runtime.machine.examine import INSTALL
from ...runtime.models.graphs import GraphSpec
from ...runtime.sampling.shapes import Profile
from .audit import Audit, inspected_layers, network_layers
from .target import Target

_MOST_WARNINGS = 5


@dataclass(frozen=True)
class BuildSettings:
    """What changes an engine besides its graph, its profiles and its target.

    Attributes:
        precision: the bundle's. TF32, which rounds float32 factors to 10 bits, stays off for graphs that compute in
            float32 (:func:`own_precision`) so that parity with float32 holds; in others it speeds up what is left in
            float32.
        workspace_gb: largest scratch memory of a kernel, 10^9 bytes; the library's default if None.
        optimization_level: of the builder, 0 (fast build) to 5.
    """

    precision: str
    workspace_gb: float | None = None
    optimization_level: int = 3


@dataclass(frozen=True)
class BuiltGraph:
    """What building one engine gave: seconds of parsing and building, precisions, warnings of one line each."""

    seconds: float
    audit: Audit
    warnings: tuple[str, ...]


def own_precision(spec: GraphSpec, precision: str) -> str:
    """What a graph of a ``precision`` bundle computes in: float32 if its contract is as tight as in float32."""
    return "fp32" if len(set(spec.tolerances.values())) == 1 else precision


def build_graph(
    graph: GraphFile,
    spec: GraphSpec,
    profiles: Sequence[Profile],
    target: Target,
    settings: BuildSettings,
    out: Path,
    reporter: Reporter,
) -> BuiltGraph:
    """Builds ``out`` from a graph; data beside the file is found by its path.

    Raises:
        BundleError: its files were replaced meanwhile.
        BackendError: Polygraphy is missing, the graph does not parse, or it cannot be built; the first line names the
            graph, and each error of the library has a line.
        KeyboardInterrupt: Ctrl-C or SIGTERM during the build; nothing has been written.
    """
    polygraphy = _Polygraphy(target.flavour)
    trt, log = target.trt, library_log(target.trt)
    log.clear()
    start = time.monotonic()
    with reporter.phases(f"{spec.kind} engine") as phases:
        phases.start("parse")
        builder = trt.Builder(log.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(trt, network, log, graph, spec)
        layers = network_layers(trt, network)
        phases.finish("parse")
        with _cancelled_by_signals() as cancelled:
            monitor = _monitor(trt, phases, cancelled)
            config = polygraphy.configure(builder, network, spec, profiles, target, settings, monitor)
            timings = _Timings(trt, config, target)
            serialized = _build(builder, network, config)
            if monitor.error is not None:
                raise monitor.error
            if cancelled.is_set():
                raise_for(cancelled.number)
        if serialized is None:
            raise BackendError(_failure(f"{FLAVOURS[target.flavour]} cannot build the {spec.kind} engine", log, target))
        seconds = time.monotonic() - start
        with atomic_path(out) as temporary:
            temporary.write_bytes(serialized)
        timings.save(config)
        audit = Audit(layers, "as parsed; not inspected: needs a GPU that runs the engine")
        if target.inspectable:
            inspected = _inspect(trt, log, serialized)
            if inspected is None:
                audit = Audit(layers, "as parsed; the engine inspector tells nothing")
            elif 2 * sum(inspected.values()) < sum(layers.values()):
                seen = f"{sum(inspected.values())} of {sum(layers.values())} products"
                audit = Audit(layers, f"as parsed; the engine inspector shows {seen}, the others are fused")
            elif layers:  # a graph without products has no layer that should run in less than float32
                audit = Audit(inspected, "engine inspector")
    said = dict.fromkeys([*timings.warnings, *log.warnings[:_MOST_WARNINGS]])
    return BuiltGraph(seconds, audit, tuple(f"{spec.kind}: {text}" for text in said))


def _parse(trt: ModuleType, network: Any, log: LogCollector, graph: GraphFile, spec: GraphSpec) -> None:
    parser = trt.OnnxParser(network, log.logger)
    if parser.parse(graph.model, str(graph.path)):
        graph.confirm()
        return
    lines = []
    for index in range(parser.num_errors):
        parser_error = parser.get_error(index)
        where = f"node {parser_error.node()}"
        if parser_error.node_name() or parser_error.node_operator():
            where += f" {parser_error.node_name()!r} ({parser_error.node_operator()})"
        lines.append(f"{where}: {parser_error.desc()}")
    first = f"the {spec.kind} graph {graph.path} does not parse: {len(lines)} errors"
    raise BackendError("\n".join([first, *(lines or [log.last_error()])]))


def _failure(first: str, log: LogCollector, target: Target) -> str:
    errors = log.errors
    if target.build_gpu is None:  # the library always looks for a driver, which these builds do not need
        errors = [text for text in errors if "cudaError" not in text] or errors
    return "\n".join([first, *(dict.fromkeys(errors) or [log.last_error()])])


def _build(builder: Any, network: Any, config: Any) -> Any:
    """In a thread of its own: Python runs the handler of signals in the main thread only, which must not be inside."""
    results: list[Any] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(builder.build_serialized_network(network, config))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="engine build", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failures:
        raise failures[0]
    return results[0]


class _Cancelled(threading.Event):
    """An event with the signal that set it."""

    number: int = signal.SIGINT

    def receive(self, number: int, _: Any) -> None:
        self.number = number
        self.set()


@contextmanager
def _cancelled_by_signals() -> Iterator[_Cancelled]:
    """An event that signals set instead of raising KeyboardInterrupt, which would leave the library running."""
    cancelled, before = _Cancelled(), {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, cancelled.receive)
        yield cancelled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _monitor(trt: ModuleType, phases: Phases, cancelled: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Shows phases; asks the library to stop once the build is cancelled or showing them fails."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._show(phases.start, phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._show(phases.step, phase_name, step + 1)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._show(phases.finish, phase_name)

        def _show(self, show: Any, *arguments: Any) -> None:
            try:
                show(*arguments)
            except BaseException as error:  # an exception that enters the library's C++ ends the process
                self.error = self.error or error
                cancelled.set()

    return Monitor()


def _inspect(trt: ModuleType, log: LogCollector, serialized: Any) -> Mapping[str, int] | None:
    try:
        runtime = trt.Runtime(log.logger)
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            return None
        inspector = engine.create_engine_inspector()
        return inspected_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except (RuntimeError, TypeError):  # how the bindings say that there is no driver, or no memory left
        return None


class _Polygraphy:
    """Polygraphy, bound to one flavour: its modules look up the library once, when they are imported."""

    def __init__(self, flavour: str) -> None:
        try:
            from polygraphy import config as own_settings
        except ImportError:
            raise BackendError(f"polygraphy is not installed; {INSTALL[flavour]}") from None
        rtx = flavour == "tensorrt-rtx"
        if "polygraphy.backend.trt" in sys.modules and bool(own_settings.USE_TENSORRT_RTX) != rtx:
            raise BackendError(
                f"Polygraphy already works with the other TensorRT in this process; build {FLAVOURS[flavour]} engines "
                "in a process of their own"
            )
        own_settings.USE_TENSORRT_RTX = rtx  # what POLYGRAPHY_USE_TENSORRT_RTX=1 sets
        self._rtx = rtx

    def configure(
        self,
        builder: Any,
        network: Any,
        spec: GraphSpec,
        profiles: Sequence[Profile],
        target: Target,
        settings: BuildSettings,
        monitor: Any,
    ) -> Any:
        """The ``trt.IBuilderConfig``."""
        from polygraphy.backend.trt import Profile as Shapes
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        trt, shapes = target.trt, []
        for sizes in profiles:
            box = Shapes()
            for tensor in spec.inputs:
                least, best, most = (tensor.shape({k: sizes[k][i] for k in sizes}) for i in range(3))
                box.add(tensor.name, least, best, most)
            shapes.append(box)
        options: dict[str, Any] = {
            "profiles": shapes,
            "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
            "builder_optimization_level": settings.optimization_level,
            "max_aux_streams": 0,  # one stream: CUDA graphs are captured on it
            "progress_monitor": monitor,
        }
        if settings.workspace_gb is not None:
            options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: int(settings.workspace_gb * 1e9)}
        if target.hardware_compatible:
            options["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        try:
            # Polygraphy prints to standard output, and uses calls that TensorRT-RTX has deprecated.
            with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                config = self._loader(target, options)(builder, network)
        except PolygraphyException as error:
            lines = str(error).strip().splitlines() or ["no reason given"]
            raise BackendError(f"the {spec.kind} engine cannot be configured: {lines[0]}") from None
        if own_precision(spec, settings.precision) == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)
        else:
            config.set_flag(trt.BuilderFlag.TF32)
        if self._rtx:  # without it a kernel may allocate when it runs, and nothing can be captured
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config

    def _loader(self, target: Target, options: Mapping[str, Any]) -> Any:
        if self._rtx:
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            pairs = [tuple(map(int, item.split("."))) for item in target.compute_capabilities]
            return CreateConfigRTX(compute_capabilities=pairs, **options)
        from polygraphy.backend.trt import CreateConfig

        return CreateConfig(**options)


class _Timings:
    """TensorRT's timing cache: kernel measurements, kept between builds per library version and GPU.

    TensorRT-RTX measures nothing when it builds, and has none. The file starts with its own checksum, because a damaged
    cache is not always noticed by the library.
    """

    def __init__(self, trt: ModuleType, config: Any, target: Target) -> None:
        self.warnings: list[str] = []
        self._path: Path | None = None
        if target.flavour != "tensorrt":
            return
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", target.build_gpu or "any")
        self._path = cache_dir() / "timing" / f"{target.flavour}-{trt.__version__}-{gpu}.cache"
        if not self._path.is_file():
            return
        try:
            digest, _, content = self._path.read_bytes().partition(b"\n")
            if hashlib.sha256(content).hexdigest().encode() != digest:
                raise ValueError("its checksum is wrong")
            timing_cache = config.create_timing_cache(content)
            if timing_cache is None or not config.set_timing_cache(timing_cache, False):
                raise ValueError("it is of another GPU or version")
            self._kept = timing_cache  # must outlive the build
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            self.warnings.append(f"timing cache {self._path} is ignored: {error}")

    def save(self, config: Any) -> None:
        """After a build; a cache that cannot be written only costs time."""
        if self._path is None:
            return
        try:
            timing_cache = config.get_timing_cache()
            if timing_cache is None:
                return
            content = bytes(timing_cache.serialize())
            with atomic_path(self._path) as temporary:
                temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        except OSError as error:
            self.warnings.append(f"timing cache {self._path} is not written: {error.strerror or error}")
