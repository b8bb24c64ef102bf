"""Where one generation's time goes: seconds and calls of each graph, and of everything around them on the host.

(Not called profile.py: a module of that name would hide Python's own from cProfile, which torch imports.)
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gtr_deploy.runtime import GtrError, Pipeline, SamplingPlan

HOST = "host"

#: What a backend without a hook is watched by: its calls, which count all that the backend does around its graphs.
_METHODS = {"condition": "backbone", "detail": "detail_score", "denoise": "diffusion_step", "decode": "decoder"}


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
    classes = [index % pipeline.architecture.classes for index in range(batch)]
    pipeline.warm_up(plan, batch)
    pipeline.generate(classes, plan=plan, batch_size=batch)
    with _watched(pipeline.backend) as parts:
        start = time.perf_counter()
        pipeline.generate(classes, plan=plan, batch_size=batch)
        total = time.perf_counter() - start
    if not parts.calls:
        raise GtrError(f"backend {pipeline.backend.name} runs whole generations and does not tell graphs apart")
    parts.seconds[HOST] = total - sum(parts.seconds.values())
    return parts


@contextmanager
def _watched(backend: Any) -> Iterator[Parts]:
    parts = Parts()
    if hasattr(backend, "hook"):
        before, backend.hook = backend.hook, lambda call: parts.add(call.kind, call.seconds)
        try:
            yield parts
        finally:
            backend.hook = before
        return
    watched = {name: kind for name, kind in _METHODS.items() if hasattr(backend, name)}
    try:
        for name, kind in watched.items():
            setattr(backend, name, _timed(getattr(backend, name), kind, parts))
        yield parts
    finally:
        for name in watched:
            vars(backend).pop(name, None)


def _timed(call: Callable[..., Any], kind: str, parts: Parts) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        parts.add(kind, time.perf_counter() - start)
        return result

    return timed
