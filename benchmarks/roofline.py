"""What this machine can do at best: fp32 matrix products and memory, and the least time that a call can take.

python benchmarks/roofline.py --threads 1

A call can be no faster than its arithmetic at the matrix rate, nor than reading its weights once at the memory rate:
floor = max(FLOPs / matrix rate, weight bytes / memory rate). Rates are measured in a process of their own, because the
threads of NumPy's BLAS are fixed when it is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from gtr_deploy.runtime import UsageError
from gtr_deploy.runtime.commands.console import print_json, print_table

MATRIX_SIZES = (512, 1024, 2048)
"""Sides of square fp32 products."""

MEMORY_BYTES = 256 * 2**20
"""Of one array, well beyond any cache."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Attributes:
        matrix: fp32 matrix products, FLOP/s (2 per multiply-add), best over libraries and sizes.
        memory: bytes/s read and written, best of read, copy and triad.
        threads: that measured.
        details: every single measurement, same units.
    """

    matrix: float
    memory: float
    threads: int
    details: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Rates:
        """What :meth:`to_json` wrote."""
        return cls(**value)

    def floor(self, flops: float, weight_bytes: float) -> float:
        """Least seconds of a call."""
        return max(flops / self.matrix, weight_bytes / self.memory)

    @property
    def text(self) -> str:
        """Such as ``86 GFLOP/s, 10.2 GB/s on 1 thread``."""
        return f"{self.matrix / 1e9:.0f} GFLOP/s, {self.memory / 1e9:.1f} GB/s on {thread_count(self.threads)}"


def thread_count(threads: int) -> str:
    """Such as ``2 threads``."""
    return f"{threads} thread" + ("s" if threads > 1 else "")


def measure_rates(threads: int, seconds: float = 8.0) -> Rates:
    """Measures in a fresh process.

    Args:
        threads: of the products and of the memory traffic; at least 1.
        seconds: about how long.

    Raises:
        UsageError: fewer than one thread, or the measuring process fails.
    """
    if threads < 1:
        raise UsageError(f"{threads} threads: give at least 1")
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    command = [sys.executable, str(Path(__file__).resolve()), "--inside", str(threads), "--seconds", str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        return Rates.from_json(json.loads(done.stdout))
    except (ValueError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UsageError(f"the machine's rates could not be measured: {reason}") from None


def combined(rates: list[Rates]) -> Rates:
    """The best of several measurements: what else runs on the machine only ever takes away from a rate."""
    details: dict[str, float] = {}
    for one in rates:
        for name, value in one.details.items():
            details[name] = max(value, details.get(name, 0.0))
    best = [max(getattr(one, name) for one in rates) for name in ("matrix", "memory")]
    return Rates(best[0], best[1], rates[0].threads, details)


def _measure(threads: int, seconds: float) -> Rates:
    """In this process, whose BLAS has the right number of threads."""
    import numpy as np

    matrix: dict[str, Callable[[], tuple[float, Callable[[], Any]]]] = {}
    memory: dict[str, Callable[[], tuple[float, Callable[[], Any]]]] = {}
    rng = np.random.default_rng(0)
    count = MEMORY_BYTES // 4

    def numpy_product(size: int) -> tuple[float, Callable[[], Any]]:
        left, right = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
        out = np.empty_like(left)
        return 2.0 * size**3, lambda: np.matmul(left, right, out=out)

    for size in MATRIX_SIZES:
        matrix[f"numpy {size}"] = lambda size=size: numpy_product(size)
    try:
        import torch
    except ImportError:
        source, target = np.ones(count, np.float32), np.zeros(count, np.float32)
        memory["numpy read"] = lambda: (MEMORY_BYTES, source.sum)
        memory["numpy copy"] = lambda: (2 * MEMORY_BYTES, lambda: np.copyto(target, source))
    else:
        torch.set_num_threads(threads)

        def torch_product(size: int) -> tuple[float, Callable[[], Any]]:
            left, right, out = (torch.randn(size, size) for _ in range(3))
            return 2.0 * size**3, lambda: torch.mm(left, right, out=out)

        for size in MATRIX_SIZES:
            matrix[f"torch {size}"] = lambda size=size: torch_product(size)
        a, b, c = (torch.ones(count) for _ in range(3))
        memory["read"] = lambda: (MEMORY_BYTES, lambda: a.sum())
        memory["copy"] = lambda: (2 * MEMORY_BYTES, lambda: b.copy_(a))
        memory["triad"] = lambda: (3 * MEMORY_BYTES, lambda: torch.add(a, b, alpha=2.0, out=c))
    each = seconds / (len(matrix) + len(memory))
    found = {name: _best_rate(*make(), each) for name, make in (matrix | memory).items()}
    return Rates(max(found[name] for name in matrix), max(found[name] for name in memory), threads, found)


def _best_rate(amount: float, call: Callable[[], Any], seconds: float) -> float:
    """``amount`` per second in the fastest of as many calls as fit, at least 3."""
    call()
    fastest, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
        calls += 1
    return amount / fastest


@click.command()
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of products and memory traffic.")
@click.option("--seconds", type=click.FloatRange(0.1), default=8.0, show_default=True, help="About how long.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@click.option("--inside", type=int, hidden=True)
def main(threads: int, seconds: float, as_json: bool, inside: int | None) -> None:
    """Measures the machine's matrix and memory rates."""
    if inside is not None:
        print_json(_measure(inside, seconds).to_json())
        return
    rates = measure_rates(threads, seconds)
    if as_json:
        print_json(rates.to_json())
        return
    rows = [
        [name, f"{value / 1e9:.1f}", "GFLOP/s" if name.split()[-1].isdigit() else "GB/s"]
        for name, value in rates.details.items()
    ]
    print_table(["what", "rate", "unit"], rows, rates.text)


if __name__ == "__main__":
    main()
