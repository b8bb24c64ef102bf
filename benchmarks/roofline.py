"""What this machine can do at best: fp32 matrix products and memory, and the least time that a generation can take.

A call can be no faster than its arithmetic at the matrix rate, nor than reading its weights once at the memory rate.
Rates are measured in a process of their own, because the threads of NumPy's BLAS are fixed when it is loaded:

python benchmarks/roofline.py 2        # two threads
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gtr_deploy.runtime import GtrError

MATRIX_SIZES = (512, 1024, 2048)
"""Sides of square fp32 products."""

MEMORY_BYTES = 256 * 2**20
"""Of one array, well beyond any cache."""

CACHED_BYTES = 64e6
"""Weights below this need not be read from memory in every call."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Attributes:
        matrix: fp32 matrix products, FLOP/s (2 per multiply-add), best over libraries and sizes.
        memory: bytes/s read and written, best of reading and copying.
        threads: that measured.
    """

    matrix: float
    memory: float
    threads: int

    @property
    def text(self) -> str:
        """Such as ``86 GFLOP/s, 10.2 GB/s, threads: 1``."""
        return f"{self.matrix / 1e9:.0f} GFLOP/s, {self.memory / 1e9:.1f} GB/s, threads: {self.threads}"

    def floor(
        self, work: Sequence[Sequence[float]], backbone_bytes: float, head_bytes: float, modulation_bytes: float = 0
    ) -> float | None:
        """Least seconds of a generation; None where the weights may well stay in a cache.

        Args:
            work: per AR step FLOPs of the backbone and the head, calls of the reverse step and of its modulation.
        """
        if backbone_bytes + head_bytes + modulation_bytes < CACHED_BYTES:
            return None
        total = 0.0
        for backbone, head, calls, *made in work:
            read = calls * head_bytes + sum(made) * modulation_bytes
            total += max(backbone / self.matrix, backbone_bytes / self.memory)
            total += max(head / self.matrix, read / self.memory)
        return total


def measure_rates(threads: int) -> Rates:
    """Measures in a fresh process, for about ten seconds.

    Raises:
        GtrError: that process fails.
    """
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    command = [sys.executable, str(Path(__file__).resolve()), str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        return Rates(**json.loads(done.stdout))
    except (ValueError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise GtrError(f"the machine's rates could not be measured: {reason}") from None


def measure_here(threads: int, seconds: float = 1.0) -> Rates:
    """In this process, whose BLAS has the right number of threads; each measurement takes ``seconds``."""
    rng = np.random.default_rng(0)
    matrix: list[float] = []
    for size in MATRIX_SIZES:
        left, right = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
        matrix.append(_best_rate(2.0 * size**3, lambda left=left, right=right: left @ right, seconds))
    source, target = np.ones(MEMORY_BYTES // 4, np.float32), np.zeros(MEMORY_BYTES // 4, np.float32)
    memory = [_best_rate(2 * MEMORY_BYTES, lambda: np.copyto(target, source), seconds)]
    try:
        import torch
    except ImportError:
        return Rates(max(matrix), max(memory), threads)
    torch.set_num_threads(threads)
    for size in MATRIX_SIZES:
        first, second = (torch.randn(size, size) for _ in range(2))
        matrix.append(_best_rate(2.0 * size**3, lambda first=first, second=second: first @ second, seconds))
    a, b = torch.from_numpy(source), torch.from_numpy(target)
    memory.append(_best_rate(MEMORY_BYTES, a.sum, seconds))
    memory.append(_best_rate(2 * MEMORY_BYTES, lambda: b.copy_(a), seconds))
    return Rates(max(matrix), max(memory), threads)


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


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(int(sys.argv[1]) if len(sys.argv) > 1 else 1))))
