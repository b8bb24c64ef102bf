"""Measured points on disk: one JSON line each, with everything that a number needs to be believed or repeated."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gtr_deploy.runtime import Bundle, UsageError
from gtr_deploy.runtime.bundle.reader import MANIFEST
from gtr_deploy.runtime.files import sha256

Record = dict[str, Any]

INSTRUCTIONS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Instruction sets that decide how fast matrix products can be."""

LIBRARIES = ("gtr-deploy", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "tensorrt", "tensorrt-rtx")

FIELDS = {"key", "model", "plan", "batch", "backend", "precision", "threads", "mode"}
"""Without these a line is no record."""


@dataclass(frozen=True)
class Environment:
    """Where points are measured.

    Attributes:
        cpu: model name.
        instructions: those of :data:`INSTRUCTIONS` that it has.
        cores: that this process may use.
        memory: bytes of the machine.
        gpu: its name, None without one.
        versions: Python and the libraries that are installed.
        code: digest of the runtime's source, since it changes more often than its version.
    """

    cpu: str
    instructions: tuple[str, ...]
    cores: int
    memory: int
    gpu: str | None
    versions: Mapping[str, str]
    code: str

    @property
    def machine(self) -> str:
        """One line: CPU model, its instruction sets, cores, and the GPU if there is one."""
        gpu = f", {self.gpu}" if self.gpu else ""
        return f"{self.cpu} ({', '.join(self.instructions) or 'no known vector instructions'}), {self.cores} cores{gpu}"

    def to_json(self) -> dict[str, Any]:
        """For a record."""
        return {
            "machine": self.machine,
            "cpu": self.cpu,
            "instructions": list(self.instructions),
            "cores": self.cores,
            "memory": self.memory,
            "gpu": self.gpu,
            "versions": dict(self.versions),
            "code": self.code,
        }


def examine() -> Environment:
    """Looks at this machine."""
    from gtr_deploy.runtime.machine.examine import examine_machine

    gpu = examine_machine().gpu
    name, flags = cpu_details()
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Environment(
        cpu=name,
        instructions=tuple(flag for flag in INSTRUCTIONS if flag in flags),
        cores=cores,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=gpu.name if gpu else None,
        versions=versions,
        code=source_digest(),
    )


def cpu_details() -> tuple[str, set[str]]:
    """Model name and instruction flags; the flags are empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    return values.get("model name") or platform.machine(), flags


def source_digest() -> str:
    """Twelve hexadecimal digits of the runtime's Python files."""
    import gtr_deploy.runtime

    folder = Path(str(gtr_deploy.runtime.__file__)).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes; empty where the system has none."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def bundle_digest(bundle: Bundle) -> str:
    """SHA-256 of the manifest, which holds the checksum of every graph."""
    return sha256(bundle.folder / MANIFEST)


def point_key(environment: Environment, **settings: Any) -> str:
    """What makes two points the same measurement: machine, versions, source, and ``settings``.

    The settings name bundle, contender, plan, batch size, threads and mode.
    """
    known = {**environment.to_json(), "settings": settings}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def read_records(path: Path) -> list[Record]:
    """All lines of a results file; none if it does not exist yet.

    Raises:
        UsageError: a line is not a record.
    """
    if not path.exists():
        return []
    records: list[Record] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}; choose another file with --results") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not set(record) >= FIELDS:
            raise UsageError(
                f"{path} line {number} is not a measured point; remove the line, or choose another file with --results"
            )
        records.append(record)
    return records


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line, in one write, and waits until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def latest(records: Sequence[Record], machine: str | None = None) -> list[Record]:
    """The newest record of each point on one machine, in the order of first appearance.

    A point that ran replaces an older one that could not, and the other way round.

    Args:
        machine: its line in the records; that of the last record by default.
    """
    if not records:
        return []
    machine = machine or records[-1].get("environment", {}).get("machine")
    found: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if record.get("environment", {}).get("machine") == machine:
            names = ("model", "plan", "batch", "backend", "precision", "threads", "mode")
            found[tuple(record[name] for name in names)] = record
    return list(found.values())
