"""What a bundle says about its engines, and which of them this machine can run.

An engine is bound to a library version, a GPU, an operating system and the graphs that it was built from. A failed
deserialization says none of that, so the manifest is the preflight: an engine is chosen or refused before it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, BundleError
from ..sampling.shapes import Profile, described

if TYPE_CHECKING:
    from ..machine.examine import Machine
    from .reader import Bundle, StoredFile

FLAVOURS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
"""Engine libraries and how people write them; in the order in which a runtime prefers them."""

_SET_FIELDS = {
    "flavour": str,
    "version": str,
    "compute_capabilities": list,
    "gpu": (str, type(None)),
    "system": str,
    "hardware_compatible": bool,
    "plans": list,
    "max_batch": int,
    "precision": str,
    "optimization_level": int,
    "graphs": dict,
}
_GRAPH_FIELDS = {"engine", "onnx", "data", "profiles", "seconds", "layers"}


@dataclass(frozen=True)
class EngineGraph:
    """The engine of one graph.

    Attributes:
        engine: the serialized engine.
        onnx, data: SHA-256 of the ONNX file, and of its data file or None, that it was built from.
        profiles: axis letter to (smallest, best, largest), per optimization profile.
        seconds: what the build took.
        layers: layers per precision, from the engine inspector; None where the library cannot inspect without a GPU.
    """

    engine: StoredFile
    onnx: str
    data: str | None
    profiles: tuple[Profile, ...]
    seconds: float
    layers: Mapping[str, int] | None

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "engine": self.engine.to_json(),
            "onnx": self.onnx,
            "data": self.data,
            "profiles": [{letter: list(sizes) for letter, sizes in profile.items()} for profile in self.profiles],
            "seconds": self.seconds,
            "layers": None if self.layers is None else dict(self.layers),
        }


@dataclass(frozen=True)
class EngineSet:
    """Engines of all graphs of a bundle, built together.

    Attributes:
        flavour: a key of ``FLAVOURS``.
        version: of the library, in full.
        compute_capabilities: such as ``("8.9", "12.0")``; what the engines may run on.
        gpu: the GPU model that they were built on; None for engines built ahead of time, which fit any GPU of a
            listed compute capability.
        system: such as ``linux-x86_64``.
        hardware_compatible: also runs on GPUs of compute capability 8.0 and later.
        plans: the plans whose shapes the profiles cover.
        max_batch: largest batch that the profiles cover.
        precision: the bundle's at that time.
        optimization_level: of the builder.
        graphs: by kind.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    system: str
    hardware_compatible: bool
    plans: tuple[str, ...]
    max_batch: int
    precision: str
    optimization_level: int
    graphs: Mapping[str, EngineGraph]

    @property
    def key(self) -> str:
        """Folder under ``engines/``: flavour, version, compute capabilities."""
        return engine_key(self.flavour, self.version, self.compute_capabilities)

    @property
    def bytes(self) -> int:
        """Size of all engines."""
        return sum(graph.engine.bytes for graph in self.graphs.values())

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "flavour": self.flavour,
            "version": self.version,
            "compute_capabilities": list(self.compute_capabilities),
            "gpu": self.gpu,
            "system": self.system,
            "hardware_compatible": self.hardware_compatible,
            "plans": list(self.plans),
            "max_batch": self.max_batch,
            "precision": self.precision,
            "optimization_level": self.optimization_level,
            "graphs": {kind: graph.to_json() for kind, graph in self.graphs.items()},
        }

    @classmethod
    def from_json(cls, value: Any, where: str, kinds: Mapping[str, Any]) -> EngineSet:
        """Strict reading; ``where`` names the place in the manifest, ``kinds`` are the graphs that must be there.

        Raises:
            BundleError: anything missing, unknown or of another type.
        """
        if not isinstance(value, dict) or set(value) != set(_SET_FIELDS):
            raise BundleError(f"{where} must have exactly {', '.join(_SET_FIELDS)}")
        for name, kind in _SET_FIELDS.items():
            wrong_number = kind is int and isinstance(value[name], bool)
            if not isinstance(value[name], kind) or wrong_number:
                raise BundleError(f"{where}.{name} is {value[name]!r}, which is not of the right type")
        if value["flavour"] not in FLAVOURS:
            raise BundleError(f"{where}.flavour {value['flavour']!r} is not one of {', '.join(FLAVOURS)}")
        for name in ("compute_capabilities", "plans"):
            if not all(isinstance(item, str) for item in value[name]):
                raise BundleError(f"{where}.{name} is not a list of texts")
        if set(value["graphs"]) != set(kinds):
            raise BundleError(f"{where}.graphs are {sorted(value['graphs'])}, expected {sorted(kinds)}")
        graphs = {kind: _graph(value["graphs"][kind], f"{where}.graphs.{kind}") for kind in kinds}
        fields = {name: value[name] for name in _SET_FIELDS}
        fields["compute_capabilities"] = tuple(value["compute_capabilities"])
        fields["plans"] = tuple(value["plans"])
        return cls(**{**fields, "graphs": graphs})


def engine_key(flavour: str, version: str, compute_capabilities: tuple[str, ...]) -> str:
    """``tensorrt-rtx-1.7.1.116-sm89-sm120``; ``any`` for an empty list."""
    parts = [f"sm{capability.replace('.', '')}" for capability in compute_capabilities] or ["any"]
    return "-".join([flavour, version, *parts])


def rebuild_command(bundle: Bundle, flavour: str) -> str:
    """What mends a refusal."""
    return f"gtr-export engine {bundle.folder} --engine {flavour}"


def refusal(engines: EngineSet, bundle: Bundle, machine: Machine) -> str | None:
    """Why these engines cannot run here, with both sides and the command that rebuilds them; None if they can."""
    name = FLAVOURS[engines.flavour]
    again = f"; rebuild with {rebuild_command(bundle, engines.flavour)}"
    for kind, graph in engines.graphs.items():
        files = bundle.graphs[kind]
        data = files.data.sha256 if files.data else None
        if (graph.onnx, graph.data) != (files.model.sha256, data):
            return (
                f"the {kind} engine was built from a graph with sha256 {graph.onnx[:12]}…, "
                f"the bundle's is {files.model.sha256[:12]}…{again}"
            )
    if engines.precision != bundle.precision:
        return f"the engines are {engines.precision}, the bundle is {bundle.precision}{again}"
    if machine.gpu is None:
        return f"{name} engines need a GPU: {machine.gpu_problem}"
    found = machine.versions.get(engines.flavour)
    if found is None:
        return f"{name} {engines.version} is needed and not installed; pip install 'gtr-deploy[{engines.flavour}]'"
    if found != engines.version:
        return f"the engines were built with {name} {engines.version}, here is {found}{again}"
    if engines.system != machine.system:
        return f"the engines were built for {engines.system}, this is {machine.system}{again}"
    here = machine.gpu.compute_capability
    listed = ", ".join(engines.compute_capabilities) or "none in particular"
    if engines.hardware_compatible and engines.flavour == "tensorrt":
        if _number(here) < (8, 0):
            return f"hardware-compatible engines need compute capability 8.0, {machine.gpu.name} has {here}{again}"
        return None
    if engines.compute_capabilities and here not in engines.compute_capabilities:
        return f"the engines were built for compute capability {listed}, {machine.gpu.name} has {here}{again}"
    if engines.gpu is not None and engines.gpu != machine.gpu.name:
        return f"the engines were built on {engines.gpu}, this is {machine.gpu.name}{again}"
    return None


def choose_engines(bundle: Bundle, machine: Machine, flavour: str) -> EngineSet:
    """The bundle's newest engines of ``flavour`` that can run here.

    Raises:
        BackendError: there are none, or each is refused; one line with every reason.
    """
    candidates = [engines for engines in bundle.engine_sets if engines.flavour == flavour]
    if not candidates:
        raise BackendError(
            f"{bundle.folder} has no {FLAVOURS[flavour]} engines; {rebuild_command(bundle, flavour)} builds them"
        )
    reasons = []
    for engines in reversed(candidates):
        reason = refusal(engines, bundle, machine)
        if reason is None:
            return engines
        reasons.append(f"{engines.key}: {reason}" if len(candidates) > 1 else reason)
    raise BackendError("; ".join(reasons))


def uncovered(bundle: Bundle, engines: EngineSet, kind: str, sizes: Mapping[str, int]) -> BackendError:
    """The error for a shape that no profile holds."""
    wanted = " ".join(f"{letter}={size}" for letter, size in sizes.items())
    held = "; ".join(described(profile) for profile in engines.graphs[kind].profiles)
    return BackendError(
        f"the {kind} engine has no profile for {wanted} (it has {held}); build one with "
        f"{rebuild_command(bundle, engines.flavour)} --plans PLANS --max-batch N (built for {', '.join(engines.plans)})"
    )


def _number(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor or 0)


def _graph(value: Any, where: str) -> EngineGraph:
    from .reader import StoredFile

    if not isinstance(value, dict) or set(value) != _GRAPH_FIELDS:
        raise BundleError(f"{where} must have exactly {', '.join(sorted(_GRAPH_FIELDS))}")
    profiles = value["profiles"]
    if not isinstance(profiles, list) or not profiles:
        raise BundleError(f"{where}.profiles is not a list with at least one profile")
    layers = value["layers"]
    if layers is not None and not (isinstance(layers, dict) and all(isinstance(n, int) for n in layers.values())):
        raise BundleError(f"{where}.layers is not a table of whole numbers")
    for name in ("onnx", "data"):
        if not (isinstance(value[name], str) or (name == "data" and value[name] is None)):
            raise BundleError(f"{where}.{name} is not a checksum")
    if isinstance(value["seconds"], bool) or not isinstance(value["seconds"], int | float):
        raise BundleError(f"{where}.seconds is not a number")
    return EngineGraph(
        StoredFile.from_json(value["engine"], f"{where}.engine"),
        value["onnx"],
        value["data"],
        tuple(_profile(profile, f"{where}.profiles") for profile in profiles),
        float(value["seconds"]),
        layers,
    )


def _profile(value: Any, where: str) -> Profile:
    if not isinstance(value, dict):
        raise BundleError(f"{where} is not a list of tables")
    profile: Profile = {}
    for letter, sizes in value.items():
        whole = isinstance(sizes, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
        if not whole or len(sizes) != 3 or not 0 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise BundleError(f"{where}: {letter} {sizes!r} is not smallest, best, largest")
        profile[letter] = (sizes[0], sizes[1], sizes[2])
    return profile
