"""gtr-run doctor: what this machine has, which backends run here or run a bundle, and the line that mends the rest."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from ..backends.registry import backend_rows, engine_refusals
from ..backends.row import BackendRow
from ..bundle.reader import Bundle
from ..errors import BundleError
from ..machine.examine import INSTALL, Machine, examine_machine
from .console import echo, print_json, print_table

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


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table: ``status`` is ``ok``, ``missing`` or ``info``."""

    subject: str
    status: str
    detail: str


def diagnose(machine: Machine, bundle: Bundle | None) -> list[Finding]:
    """The doctor's table: whether each backend can run this bundle, or whether it can run at all if None."""
    findings = [Finding("python", "info", f"{platform.python_version()} on {machine.system}"), _gpu(machine)]
    findings += [_library(name, machine) for name in _USE]
    damage = ""
    if bundle is not None:
        described, damage = _bundle(bundle)
        findings.append(described)
    for row in backend_rows():
        findings.append(_backend(row, machine, bundle, damage))
        if bundle is not None:
            sets = engine_refusals(bundle, machine, row.name)
            findings += [
                Finding(f"engines {key}", "info" if reason else "ok", reason or "run here")
                for key, reason in sets.items()
                if len(sets) > 1 and not row.problem(machine)
            ]
    return findings


def can_run(findings: Sequence[Finding]) -> list[str]:
    """Names of the backends that can run, in the order of the table."""
    return [f.subject.removeprefix(BACKEND) for f in findings if f.subject.startswith(BACKEND) and f.status == "ok"]


def _gpu(machine: Machine) -> Finding:
    gpu = machine.gpu
    if gpu is None:
        return Finding("gpu", "missing", machine.gpu_problem or "no GPU was found")
    text = f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory / 2**30:.0f} GiB, driver {gpu.driver}"
    return Finding("gpu", "ok", text)


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


def _backend(row: BackendRow, machine: Machine, bundle: Bundle | None, damage: str) -> Finding:
    reason = row.problem(machine)
    if not reason and bundle is not None:
        reason = (damage if row.reads_graphs else "") or row.refusal(bundle, machine)
    what = row.what if isinstance(row.what, str) else "" if reason else row.what(machine, bundle)
    return Finding(BACKEND + row.label, "missing" if reason else "ok", reason or what)


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
        echo(f"{what} can be run by: {', '.join(able) or 'nothing on this machine'}")
    if opened is not None and not able:
        context.exit(1)
