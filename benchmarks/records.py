"""Measurements on disk: one JSON line per timed generation, with what a number needs to be believed or repeated."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import sqrt
from pathlib import Path
from statistics import median, stdev
from typing import Any

from gtr_deploy.runtime import UsageError

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm", "bf16")
"""Instruction sets that decide how fast matrix products can be."""

LIBRARIES = ("gtr-deploy", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "tensorrt", "tensorrt-rtx")

NAMES = ("model", "plan", "batch", "backend", "precision", "threads")
"""What one measured point is, beside run and machine."""

ORIGINAL = "original"
AUTOCAST, COMPILED = PEERS = ("original bf16", "original compiled")
"""What else a user might do with the original's code: bfloat16 autocast, torch.compile."""
REFERENCES = (ORIGINAL, *PEERS, "torch")
"""Timed with the plan ``mar`` alone. Ratios are against the original in float32, or else the torch backend."""


def environment() -> dict[str, Any]:
    """This machine and what is installed: cpu, flags, cores, memory, gpu, versions, digest of the runtime's source."""
    from gtr_deploy.runtime.machine.examine import examine_machine

    cpu, flags = cpu_details()
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    gpu = examine_machine().gpu
    return {
        "cpu": cpu,
        "instructions": flags,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu.name if gpu else None,
        "versions": versions,
        "code": _source_digest(),
    }


def cpu_details() -> tuple[str, list[str]]:
    """Model name and those of :data:`FLAGS` that it has; no flags where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    return values.get("model name") or platform.machine(), [flag for flag in FLAGS if flag in flags]


def _source_digest() -> str:
    """Twelve hexadecimal digits of the runtime's Python files, which change more often than its version."""
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


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line, in one write, and waits until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All lines of a results file, also those of older versions of these scripts.

    Raises:
        UsageError: it cannot be read, or a line is not a measurement.
    """
    records: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}; choose another file with --results") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not set(record) >= {*NAMES, "run", "environment"}:
            raise UsageError(f"{path} line {number} is not a measurement; remove it, or choose another --results")
        records.append(record)
    return records


@dataclass(frozen=True)
class Point:
    """All timed generations of one contender in one run.

    Attributes:
        record: one of its lines.
        wall, cpu: seconds of each generation of the whole batch, without the decoder; cpu may be empty.
        ratio: times as fast per image as the reference of the same run; None without one.
    """

    record: Mapping[str, Any]
    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    ratio: float | None = None

    @property
    def seconds(self) -> float:
        """Median per image."""
        return median(self.wall) / self.record["batch"]

    @property
    def cpu_seconds(self) -> float | None:
        """Median of processor time per image."""
        return median(self.cpu) / self.record["batch"] if self.cpu else None

    @property
    def half_interval(self) -> float | None:
        """Half of the mean's 95 % interval per image, by the normal distribution; None below 3 generations."""
        if len(self.wall) < 3:
            return None
        return 1.96 * stdev(self.wall) / sqrt(len(self.wall)) / self.record["batch"]

    @property
    def name(self) -> str:
        """Plan, backend and precision."""
        return f"{self.record['plan']}  {self.record['backend']} {self.record['precision']}"


def points_of(records: Sequence[Mapping[str, Any]]) -> list[Point]:
    """One per contender, plan and batch size of each run, oldest run first, with its ratio inside that run.

    Older lines that put a generation together from single calls stand for one generation each; where a run has both,
    the whole generations count.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record.get("mode", "whole") != "whole"):
        if "seconds" not in record:
            continue  # an older line that says why something could not run
        key = (record["run"], *(record[name] for name in NAMES))
        if groups.setdefault(key, [record])[0].get("mode", "whole") == record.get("mode", "whole"):
            groups[key] += [] if record is groups[key][0] else [record]
    found = {key: _point(lines) for key, lines in groups.items()}
    return sorted((_with_ratio(key, found) for key in found), key=lambda point: str(point.record["run"]))


def _point(lines: Sequence[Mapping[str, Any]]) -> Point:
    wall = [second for line in lines for second in line.get("repetitions", [line["seconds"]])]
    return Point(lines[-1], tuple(wall), tuple(line["cpu_seconds"] for line in lines if "cpu_seconds" in line))


def _with_ratio(key: tuple[Any, ...], found: Mapping[tuple[Any, ...], Point]) -> Point:
    run, model, _, batch, _, _, threads = key
    for backend in (ORIGINAL, "torch"):
        for size in (batch, 1):
            reference = found.get((run, model, "mar", size, backend, "fp32", threads))
            if reference is not None:
                own = found[key]
                return Point(own.record, own.wall, own.cpu, reference.seconds / own.seconds)
    return found[key]
