"""Seconds per operator type inside ONNX graphs, from ONNX Runtime's own profiler."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from profile_parts import part_of_graph

_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class OperatorTime:
    """All calls of one operator type, or of one node, in one part.

    Attributes:
        part: ``backbone``, ``detail`` or ``head``.
        name: operator type, or the node's own name.
        seconds: inside its kernel.
        calls: of the kernel.
        share: of all kernels' seconds in the part.
    """

    part: str
    name: str
    seconds: float
    calls: int
    share: float


class ProfiledSessions:
    """Sessions whose kernels are being timed; :meth:`finish` ends that and reads the results."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[tuple[str, Any]] = []
        self._files: list[tuple[str, Path]] = []

    @contextmanager
    def opening(self) -> Iterator[None]:
        """ONNX Runtime sessions that are opened inside the block are profiled, with the options they ask for."""
        import onnxruntime

        real = onnxruntime.InferenceSession

        def opened(path: str, options: Any = None, **others: Any) -> Any:
            part = part_of_graph(str(path))
            if part is None:
                return real(path, options, **others)
            options = options or onnxruntime.SessionOptions()
            options.enable_profiling = True
            options.profile_file_prefix = str(self._folder / f"{part}-{len(self._open)}")
            session = real(path, options, **others)
            options.enable_profiling = False
            self._open.append((part, session))
            return session

        with patch.object(onnxruntime, "InferenceSession", opened):
            yield

    def finish(self) -> None:
        """Ends profiling; once."""
        self._files += [(part, Path(session.end_profiling())) for part, session in self._open]
        self._open.clear()

    def operators(self) -> list[OperatorTime]:
        """Per part and operator type, largest first."""
        return self._sums(lambda event: event["args"].get("op_name", "?"))

    def nodes(self) -> list[OperatorTime]:
        """Per part and node, largest first."""
        return self._sums(lambda event: event["name"].removesuffix(_KERNEL))

    def _sums(self, key: Any) -> list[OperatorTime]:
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        calls: dict[tuple[str, str], int] = defaultdict(int)
        totals: dict[str, float] = defaultdict(float)
        for part, path in self._files:
            for event in _kernels(path):
                name = key(event)
                spent = event["dur"] * 1e-6
                seconds[part, name] += spent
                calls[part, name] += 1
                totals[part] += spent
        found = [
            OperatorTime(part, name, spent, calls[part, name], spent / totals[part] if totals[part] else 0.0)
            for (part, name), spent in seconds.items()
        ]
        return sorted(found, key=lambda entry: (entry.part, -entry.seconds))


def _kernels(path: Path) -> list[dict[str, Any]]:
    """The profiler's events of kernels; an empty profile has none."""
    text = path.read_text(encoding="utf-8")
    events = json.loads(text) if text.strip() else []
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)]
