"""Which of a bundle's engines this machine can run.

An engine is bound to a library version, a GPU, an operating system and the graphs that it was built from. A failed
deserialization says none of that, so the manifest is the preflight: an engine is chosen or refused before it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import BackendError
from ..sampling.shapes import described
from .manifest import FLAVOURS, EngineSet
from .reader import Bundle

if TYPE_CHECKING:
    from ..machine.examine import Machine


def rebuild_command(bundle: Bundle, flavour: str) -> str:
    """What mends a refusal."""
    return f"gtr-export engine {bundle.folder} --engine {flavour}"


def refusal(engines: EngineSet, bundle: Bundle, machine: Machine) -> str | None:
    """Why these engines cannot run here, with both sides and the command that rebuilds them; None if they can."""
    name = FLAVOURS[engines.flavour]
    again = f"; rebuild with {rebuild_command(bundle, engines.flavour)}"
    for kind, graph in engines.graphs.items():
        files = bundle.graphs[kind]
        if (graph.onnx, graph.data) != files.checksums:
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
