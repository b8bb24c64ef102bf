"""How many processors this process may use, which in a container is not how many the machine has."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Processors by affinity, cut to the quota of the container; at least 1."""
    # os.sched_getaffinity is Linux's alone.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return count if quota is None else max(1, min(count, int(quota)))


def thread_limit() -> int | None:
    """Threads for a library that would take the whole machine's cores by itself; None where that is right."""
    usable = usable_cpus()
    return usable if usable < (os.cpu_count() or 1) else None


def _quota() -> float | None:
    """Processors that the control group allows, version 2 or 1; None without a limit."""
    try:
        numbers = (_CGROUPS / "cpu.max").read_text().split()
    except OSError:
        try:
            numbers = [(_CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
        except OSError:
            return None
    try:
        quota, period = int(numbers[0]), int(numbers[1])
    except (ValueError, IndexError):  # "max"
        return None
    return quota / period if quota > 0 and period > 0 else None
