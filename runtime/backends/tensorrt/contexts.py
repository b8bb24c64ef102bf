"""The execution contexts of all engines, one per graph and shape, shared by those who need them, over one arena.

Activations may be shared because the graphs never run at the same time. A context goes with its last user: it holds GPU
memory of its own. Knows no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ...errors import BackendError
from ...machine.cuda import Cuda
from ..blocks import padded
from .engine import Engine, EngineCall


class Contexts:
    """Contexts by graph and shape, their activations placed."""

    def __init__(self, cuda: Cuda, stream: int, moving: Callable[[], None]) -> None:
        """``moving`` is called before the arena moves: what was captured on it is of no use any more."""
        self.engines: dict[str, Engine] = {}
        self._cuda, self._stream, self._moving = cuda, stream, moving
        self._arena, self._size = 0, 0

    def take(self, shapes: Iterable[tuple[str, Mapping[str, int]]]) -> list[EngineCall]:
        """The contexts of (graph kind, sizes); each must be given back.

        Raises:
            BackendError: there is no such engine, or no profile holds a shape.
            CudaError, NoContextError: memory is missing. The contexts that others have are of no use after this.
        """
        taken: list[EngineCall] = []
        try:
            for kind, sizes in shapes:
                if kind not in self.engines:
                    raise BackendError(f"this bundle has no {kind} engine")
                call = self.engines[kind].call(sizes, self._stream)
                call.users += 1
                taken.append(call)
            self._place(taken)
        except BaseException:
            self.give_back(taken)
            raise
        return taken

    def give_back(self, calls: Iterable[EngineCall]) -> None:
        """Nothing of them may still be running, nor be captured."""
        for call in calls:
            call.users -= 1
            if not call.users:
                self.engines[call.kind].forget(call)

    def _place(self, taken: list[EngineCall]) -> None:
        size = padded(max([1, *(call.memory for call in taken)]))
        if size > self._size:
            self._cuda.synchronize(self._stream)
            self._moving()
            self._cuda.free(self._arena)
            self._arena, self._size = 0, 0
            self._arena = self._cuda.allocate(size)
            self._size = size
            taken = [call for engine in self.engines.values() for call in engine.calls]
        for call in taken:
            call.set_memory(self._arena, self._size)

    def free(self) -> None:
        """Gives the arena back; after this the contexts are good for nothing."""
        self._cuda.free(self._arena)
        self._arena, self._size = 0, 0
