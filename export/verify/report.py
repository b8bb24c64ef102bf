"""What verification has found, and how it is kept in the bundle. Knows no graph."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...runtime.bundle.reader import Bundle
from ...runtime.errors import BundleError
from .respacing import Respacing

RUNGS = ("loads", "finite", "graphs", "images")


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        subject: graph, shape or plan.
        status: ``ok``, ``failed`` or ``skipped``.
        value, tolerance: relative error, where there is one, and its limit.
    """

    rung: str
    subject: str
    status: str
    value: float | None = None
    tolerance: float | None = None
    note: str = ""


@dataclass
class Report:
    """All checks of one bundle."""

    model: str
    precision: str
    evaluated_with: str
    checks: list[Check] = field(default_factory=list)
    engine: str = "onnxruntime"
    respacing: Respacing | None = None
    weights_warning: str = ""

    @property
    def file(self) -> str:
        """Its name in the bundle's reports."""
        return "parity.json" if self.engine == "onnxruntime" else f"parity-{self.engine}.json"

    @property
    def failed(self) -> bool:
        """Some check failed."""
        return any(check.status == "failed" for check in self.checks)

    @property
    def reached(self) -> str:
        """The highest rung without a failure or a gap below it; ``none`` if the bundle does not load."""
        highest = "none"
        for rung in RUNGS:
            states = [check.status for check in self.checks if check.rung == rung]
            if "ok" not in states or "failed" in states:
                break
            highest = rung
            if "skipped" in states:
                break
        return highest

    def to_json(self) -> dict[str, Any]:
        """For ``--json`` and reports/parity.json."""
        return {
            "model": self.model,
            "precision": self.precision,
            "evaluated_with": self.evaluated_with,
            "rung_reached": self.reached,
            "failed": self.failed,
            "checks": [asdict(check) for check in self.checks],
            "weights_warning": self.weights_warning or None,
            "respacing": self.respacing.to_json() if self.respacing else None,
        }


def keep_report(folder: Path, report: Report) -> str | None:
    """Writes ``reports/parity.json``, or ``parity-<engine>.json``, into the bundle; why that could not be, or None. The
    checks took minutes, and hold without it."""
    try:
        Bundle.load(folder).write_report(report.file.removesuffix(".json"), report.to_json())
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror or error}"
    except BundleError as error:
        return str(error)
    return None
