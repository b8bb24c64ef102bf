"""Where one generation's time goes: seconds and calls of each graph, and of everything around them on the host.

(Not called profile.py: a module of that name would hide Python's own from cProfile, which torch imports.)
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from gtr_deploy.runtime import GtrError, Pipeline, SamplingPlan

HOST = "host"


@dataclass
class Parts:
    """Of one generation; kinds are those of the graphs, and ``host``.

    Attributes:
        seconds: by kind.
        calls: by kind; the host has none.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, kind: str, seconds: float) -> None:
        """One more call."""
        self.seconds[kind] += seconds
        self.calls[kind] += 1


def profile_parts(pipeline: Pipeline, plan: SamplingPlan, batch: int) -> Parts:
    """Runs a generation twice, the second time watched.

    Raises:
        GtrError: the backend runs whole generations and reports no graphs.
    """
    requests = pipeline.conditioner.samples(batch)
    pipeline.warm_up(plan, batch)
    pipeline.generate(requests, plan=plan, batch_size=batch)
    parts, backend = Parts(), pipeline.backend
    backend.hook = lambda call: parts.add(call.kind, call.seconds)
    try:
        start = time.perf_counter()
        pipeline.generate(requests, plan=plan, batch_size=batch)
        total = time.perf_counter() - start
    finally:
        backend.hook = None
    if not parts.calls:
        raise GtrError(f"backend {pipeline.backend.name} runs whole generations and does not tell graphs apart")
    parts.seconds[HOST] = total - sum(parts.seconds.values())
    return parts
