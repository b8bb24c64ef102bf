"""gtr-run doctor: what this machine has, which backends run here or run a bundle, and the line that mends the rest."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import click

from ..backends.openvino.library import version_problem
from ..backends.registry import ENTRY_POINTS, cpu_provider_refusal, openvino_refusal
from ..bundle.engine_sets import EngineSet, rebuild_command, refusal
from ..bundle.reader import Bundle
from ..errors import BundleError
from ..machine.examine import INSTALL, Machine, examine_machine
from .console import print_json, print_table

#: Subjects of the findings that decide whether something can run start with this.
BACKEND = "backend "
_USE = {
    "onnxruntime": "runs graphs as they are",
    "openvino": "runs graphs as they are, on CPUs",
    "tensorrt": "builds and runs engines",
    "tensorrt-rtx": "builds and runs engines",
    "cuda-bindings": "GPU memory and streams for TensorRT",
    "polygraphy": "comparing and debugging engines",
    "numpy": "arrays",
}
#: The oldest version whose API the code uses; tests/export/test_tensorrt_api.py holds it to newer ones.
_OLDEST = {"tensorrt": (10, 12), "tensorrt-rtx": (1, 7)}
#: TensorRT-RTX has kernels for these alone: consumer and workstation GPUs, not the data center's 9.0 and 10.0.
_RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table: ``status`` is ``ok``, ``missing`` or ``info``."""

    subject: str
    status: str
    detail: str


def diagnose(machine: Machine, bundle: Bundle | None) -> list[Finding]:
    """The doctor's table.

    Args:
        bundle: whether each backend can run this bundle; whether it can run at all if None.
    """
    findings = [Finding("python", "info", f"{platform.python_version()} on {machine.system}"), _gpu(machine)]
    findings += [_library(name, machine) for name in _USE]
    damage = ""
    if bundle is not None:
        described, damage = _bundle(bundle)
        findings.append(described)
    findings += [_onnxruntime_cpu(machine, bundle, damage), _onnxruntime_cuda(machine, damage)]
    findings.append(_openvino(machine, bundle, damage))
    for flavour in _OLDEST:
        findings += _engines(flavour, machine, bundle)
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    return findings + [_entry_point(point, bundle) for point in points]


def can_run(findings: Sequence[Finding]) -> list[str]:
    """Names of the backends that can run, in the order of the table."""
    return [f.subject.removeprefix(BACKEND) for f in findings if f.subject.startswith(BACKEND) and f.status == "ok"]


def _gpu(machine: Machine) -> Finding:
    gpu = machine.gpu
    if gpu is None:
        return Finding("gpu", "missing", _gpu_problem(machine))
    text = f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory / 2**30:.0f} GiB, driver {gpu.driver}"
    return Finding("gpu", "ok", text)


def _gpu_problem(machine: Machine) -> str:
    return machine.gpu_problem or "no GPU was found"


def _library(name: str, machine: Machine) -> Finding:
    found = machine.versions.get(name)
    if found is not None:
        providers = f"; {', '.join(machine.onnxruntime_providers)}" if name == "onnxruntime" else ""
        return Finding(name, "ok", f"{found} ({_USE[name]}{providers})")
    # The last two come with either flavour of TensorRT, or with the package itself.
    remedy = INSTALL.get(name, f"pip install {name}")
    return Finding(name, "missing", f"{machine.problems.get(name) or 'not installed'} ({_USE[name]}); {remedy}")


def _bundle(bundle: Bundle) -> tuple[Finding, str]:
    """The bundle's line, and what is wrong with its graph files. Sizes only: checksums of gigabytes take too long."""
    try:
        bundle.graph_paths(checksums=False)
    except BundleError as error:
        return Finding("bundle", "missing", str(error)), str(error)
    size = sum(files.bytes for files in bundle.graphs.values()) / 1e6
    text = f"{bundle.folder}: {bundle.architecture.name}, {bundle.precision}, {size:.1f} MB of graphs"
    return Finding("bundle", "ok", f"{text}, engines: {', '.join(s.key for s in bundle.engine_sets) or 'none'}"), ""


def _lacks(library: str, machine: Machine, remedy: str = "") -> str:
    """Why a library cannot be used and how to get it; empty if it can."""
    if machine.versions.get(library) is not None:
        return ""
    return f"{machine.problems.get(library) or f'{library} is not installed'}; {INSTALL[remedy or library]}"


def _onnxruntime_cpu(machine: Machine, bundle: Bundle | None, damage: str) -> Finding:
    reason = _lacks("onnxruntime", machine) or damage
    if not reason and bundle is not None:
        reason = cpu_provider_refusal(bundle) or ""
    return _backend("onnxruntime cpu", reason, f"onnxruntime {machine.versions.get('onnxruntime')}")


def _onnxruntime_cuda(machine: Machine, damage: str) -> Finding:
    reason = _lacks("onnxruntime", machine, "onnxruntime-cuda")
    if not reason and machine.gpu is None:
        reason = _gpu_problem(machine)
    if not reason and "CUDAExecutionProvider" not in machine.onnxruntime_providers:
        # Both distributions install the same module: the CPU one has to go first.
        reason = "this onnxruntime has no CUDA provider; pip uninstall -y onnxruntime && " + INSTALL["onnxruntime-cuda"]
    reason = reason or damage
    return _backend("onnxruntime cuda", reason, f"onnxruntime {machine.versions.get('onnxruntime')}, CUDA provider")


def _openvino(machine: Machine, bundle: Bundle | None, damage: str) -> Finding:
    found = machine.versions.get("openvino")
    reason = _lacks("openvino", machine) if found is None else version_problem(found) or damage
    if not reason and bundle is not None:
        reason = openvino_refusal(bundle) or ""
    bfloat16 = "bfloat16" if "BF16" in machine.openvino_capabilities else "float32, since this CPU has no bfloat16"
    return _backend("openvino", reason, f"openvino {found}, bf16 bundles in {bfloat16}")


def _engines(flavour: str, machine: Machine, bundle: Bundle | None) -> list[Finding]:
    """The line of one flavour of TensorRT; where the bundle has several engine sets of it, one more line for each."""
    problem = _tensorrt_problem(flavour, machine)
    found = f"{flavour} {machine.versions.get(flavour)}"
    if bundle is None:
        return [_backend(flavour, problem, f"{found}; gtr-export engine BUNDLE --engine {flavour} builds engines")]
    sets = [engine_set for engine_set in bundle.engine_sets if engine_set.flavour == flavour]
    if problem or not sets:
        reason = problem or f"the bundle has no {flavour} engines; {rebuild_command(bundle, flavour)}"
        return [_backend(flavour, reason, "")]
    refusals = {engine_set.key: _refusal(engine_set, bundle, machine) for engine_set in sets}
    runnable = [key for key, reason in refusals.items() if reason is None]
    first = "" if runnable else next(iter(refusals.values())) or ""
    findings = [_backend(flavour, first, f"{found}, {', '.join(runnable)}")]
    if len(sets) > 1:
        findings += [
            Finding(f"engines {key}", "info" if reason else "ok", reason or "run here")
            for key, reason in refusals.items()
        ]
    return findings


def _refusal(engines: EngineSet, bundle: Bundle, machine: Machine) -> str | None:
    """Why these engines cannot run here, damaged files included; None if they can."""
    reason = refusal(engines, bundle, machine)
    if reason is None:
        try:
            bundle.engine_paths(engines, checksums=False)
        except BundleError as error:
            return str(error)
    return reason


def _tensorrt_problem(flavour: str, machine: Machine) -> str:
    """Why this flavour runs no engine here whatever the bundle; empty if it does."""
    found, install = machine.versions.get(flavour), INSTALL[flavour]
    if found is None:
        return _lacks(flavour, machine)
    if _numbers(found) < _OLDEST[flavour]:
        oldest = ".".join(map(str, _OLDEST[flavour]))
        return f"{flavour} {found} is too old, {oldest} is needed; {install.replace('install', 'install --upgrade')}"
    if machine.gpu is None:
        # Its compiler needs no GPU, so that the engines of other machines can be built on this one.
        builds = "; it can still build engines for other machines" if flavour == "tensorrt-rtx" else ""
        return _gpu_problem(machine) + builds
    if machine.versions.get("cuda-bindings") is None:
        return f"{machine.problems.get('cuda-bindings') or 'cuda-bindings is not installed'}; {install}"
    capability = machine.gpu.compute_capability
    if flavour == "tensorrt-rtx" and capability not in _RTX_CAPABILITIES:
        return f"{flavour} runs on compute capability {', '.join(_RTX_CAPABILITIES)}, not on {capability}; use tensorrt"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """The leading whole numbers of a version."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _entry_point(point: EntryPoint, bundle: Bundle | None) -> Finding:
    """A backend from outside. Only found, not loaded: loading imports PyTorch, which may take seconds."""
    if point.name != "torch":
        return _backend(point.name, "", f"entry point {point.value}")
    try:
        found = importlib.util.find_spec("torch") is not None
    except ImportError:
        found = False
    reason = "" if found else "PyTorch is not installed; pip install 'gtr-deploy[export]'"
    if bundle is not None and not reason and bundle.precision not in ("fp32", "fp16", "bf16"):
        reason = f"the torch backend has no precision {bundle.precision}"
    if bundle is not None and not reason and (path := _lost_weights(bundle)):
        reason = f"PyTorch reads the checkpoint, not the graphs, and {path} is not on this machine"
    return _backend(point.name, reason, "the slow reference, from the checkpoint that the bundle was made from")


def _lost_weights(bundle: Bundle) -> str:
    """A weights file that the bundle was made from and that is not here; empty if none is missed."""
    if bundle.architecture.name == "mar-digits":  # its weights ship with the export part
        return ""
    source = bundle.manifest.source
    return next((file.path for file in (source.checkpoint, source.vae) if file and not Path(file.path).is_file()), "")


def _backend(name: str, reason: str, detail: str) -> Finding:
    return Finding(BACKEND + name, "missing" if reason else "ok", reason or detail)


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@click.pass_context
def doctor(context: click.Context, bundle: Path | None, as_json: bool) -> None:
    """Say what this machine has for running, which backends can run BUNDLE, and how to get the rest.

    Exits with 1 if no backend can run BUNDLE.
    """
    opened = Bundle.load(bundle) if bundle is not None else None
    machine = examine_machine()
    findings = diagnose(machine, opened)
    able = can_run(findings)
    if as_json:
        print_json(
            {
                "machine": asdict(machine),
                "bundle": str(bundle) if bundle else None,
                "can_run": able,
                "findings": [asdict(finding) for finding in findings],
            }
        )
    else:
        print_table(["what", "status", "detail"], [[f.subject, f.status, f.detail] for f in findings])
        what = bundle if bundle is not None else "bundles"
        click.echo(f"{what} can be run by: {', '.join(able) or 'nothing on this machine'}")
    if opened is not None and not able:
        context.exit(1)
