"""What a CUDA graph costs on this GPU, with the runtime's own CUDA layer alone: memory and microseconds per node.

The first thing to run on a GPU (docs/gpu.md): nodes are small copies within the GPU, as between the graphs of a
generation. Needs cuda-bindings and a driver, and neither TensorRT nor torch.

    python benchmarks/gpu_first.py --nodes 1000,10000,100000 --out gpu-first.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gtr_deploy.runtime.errors import GtrError
from gtr_deploy.runtime.machine.cuda import Cuda

ROWS, WIDTH = 64, 256


def measure_graph(cuda: Cuda, nodes: int) -> dict[str, float]:
    """Seconds of queueing eagerly, capturing and launching a graph of so many copies, and the GPU memory it takes."""
    stream, memory = cuda.create_stream(), [cuda.allocate(ROWS * WIDTH) for _ in range(2)]
    executable = 0

    def record() -> None:
        for index in range(nodes):
            cuda.copy_rows(memory[index % 2], WIDTH, memory[1 - index % 2], WIDTH, WIDTH, ROWS, stream)

    def timed(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        cuda.synchronize(stream)
        return time.perf_counter() - start

    try:
        timed(record)  # whatever is made at the first call
        eager, free = timed(record), cuda.memory()[0]
        start = time.perf_counter()
        executable, found = cuda.capture(stream, record)
        cuda.synchronize(stream)
        captured = time.perf_counter() - start
        taken = free - cuda.memory()[0]
        launches = [timed(lambda: cuda.launch(executable, stream)) for _ in range(6)]
    finally:
        cuda.synchronize(stream)
        cuda.destroy_graph(executable)
        for address in memory:
            cuda.free(address)
        cuda.destroy_stream(stream)
    return {
        "nodes": found,
        "eager_us_per_node": eager / nodes * 1e6,
        "capture_seconds": captured,
        "first_launch_us_per_node": launches[0] / nodes * 1e6,
        "later_launch_us_per_node": min(launches[1:]) / nodes * 1e6,
        "bytes_per_node": taken / nodes,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line per size; with ``--out`` writes all as JSON after every size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", default="1000,10000,100000")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        cuda = Cuda(options.device)
        found: list[dict[str, float]] = []
        for nodes in map(int, options.nodes.split(",")):
            found.append(measure_graph(cuda, nodes))
            print(", ".join(f"{name} {value:.4g}" for name, value in found[-1].items()), flush=True)
            if options.out is not None:
                content = {"gpu": cuda.device.name, "driver": cuda.device.driver, "graphs": found}
                options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except (GtrError, OSError, ValueError) as error:
        print(f"gpu_first: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
