"""What one row of the table of backends says. Knows no library; the rows are in registry.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .protocol import Backend

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from ..machine.examine import Machine

PROVIDERS = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class BackendOptions:
    """What a user can say about the backend.

    Attributes:
        backend: the name of a row, or ``auto``: see :func:`choose_backend`.
        provider: where onnxruntime and torch compute, one of ``PROVIDERS``; auto is CUDA where it can be used.
        threads: threads of one call on the CPU; the library's default if None.
        device: index of the GPU.
        cuda_graph: one of ``CUDA_GRAPH_MODES``; onnxruntime and torch only tell ``off`` from the rest; openvino has
            none.
        precision: of the torch backend; the bundle's if None.
    """

    backend: str = "auto"
    provider: str = "auto"
    threads: int | None = None
    device: int = 0
    cuda_graph: str = "auto"
    precision: str | None = None


def _nothing(*_: object) -> str:
    return ""


@dataclass(frozen=True)
class BackendRow:
    """One backend.

    Attributes:
        name: what ``--backend`` takes.
        open: (bundle, options, compare checksums) to the backend.
        what: what it is, one line for doctor; (machine, bundle or None) to it where that depends.
        provider: ``cpu`` or ``cuda`` where a library has a row for each.
        library: that it needs, a key of ``Machine.versions`` or the name of a distribution; None if :attr:`lacks` knows
            alone. ``oldest``: its version, such as (2026, 3). ``install``: the line that installs it.
        gpu: it needs one; ``without_gpu`` is a clause on what it is still good for without.
        reads_graphs: it runs the bundle's graphs, not engines or a checkpoint.
        unsupported: precision to what is wrong with it and what can be done; ``{model}`` is the model's name.
        lacks: why it runs nothing on a machine whose library and GPU are there; empty if it does.
        refuses: why it does not run a bundle on a machine that lacks nothing; empty if it does.
        rank: how far up it stands when nobody chooses; None: it is never taken unasked.
        because: (bundle, machine) to a clause why it is taken unasked; may be empty.
    """

    name: str
    open: Callable[[Bundle, BackendOptions, bool], Backend]
    what: str | Callable[[Machine, Bundle | None], str] = ""
    provider: str = ""
    library: str | None = None
    oldest: tuple[int, ...] = ()
    install: str = ""
    gpu: bool = False
    without_gpu: str = ""
    reads_graphs: bool = True
    unsupported: Mapping[str, str] = field(default_factory=dict)
    lacks: Callable[[Machine], str] = _nothing
    refuses: Callable[[Bundle, Machine], str] = _nothing
    rank: Callable[[Bundle, Machine], float | None] = lambda bundle, machine: None
    because: Callable[[Bundle, Machine], str] = _nothing

    @property
    def label(self) -> str:
        """Such as ``onnxruntime cpu``."""
        return f"{self.name} {self.provider}".strip()

    def problem(self, machine: Machine) -> str:
        """Why it runs nothing on this machine, and the line that mends it; empty if it can."""
        if self.library is not None:
            found = machine.version_of(self.library)
            if found is None:
                missing = machine.problems.get(self.library) or f"{self.library} is not installed"
                return f"{missing}; {self.install}" if self.install else missing
            if reason := self.age_problem(found):
                return reason
        if self.gpu and machine.gpu is None:
            return (machine.gpu_problem or "no GPU was found") + self.without_gpu
        return self.lacks(machine)

    def age_problem(self, found: str) -> str:
        """Why this version of the library is of no use; empty if it is."""
        if _numbers(found) >= self.oldest:
            return ""
        oldest = ".".join(map(str, self.oldest))
        return f"{self.library} {found} is too old, {oldest} is needed; {self.install}"

    def refusal(self, bundle: Bundle, machine: Machine) -> str:
        """Why it does not run this bundle on this machine; empty if it does."""
        return self.problem(machine) or self.precision_problem(bundle) or self.refuses(bundle, machine)

    def precision_problem(self, bundle: Bundle) -> str:
        """Why it does not run the bundle's precision; empty if it does."""
        return self.unsupported.get(bundle.precision, "").format(model=bundle.architecture.name)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading whole numbers of a version."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
