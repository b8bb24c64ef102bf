"""Ctrl-C and SIGTERM in the middle of long work. Both raise an exception, so that temporary files go; what is kept is
said by the command (:func:`if_stopped`). Work that can end at a better place asks for it (:class:`Stop`): then the
first signal is only noted, and the second one stops at once. Knows nothing of the work."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def raise_for(number: int, _: FrameType | None = None) -> NoReturn:
    """A signal's exception."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def terminable() -> Iterator[None]:
    """While it is entered, SIGTERM raises :class:`Terminated` where it would end the process at once."""
    able = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if able:
        signal.signal(signal.SIGTERM, raise_for)
    try:
        yield
    finally:
        if able:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def if_stopped(line: str | Callable[[], str]) -> Iterator[None]:
    """What is kept if a signal ends the block or the command that it decorates, and how to go on. The innermost line
    counts."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        stopped.args = stopped.args or (line if isinstance(line, str) else line(),)
        raise


class StopNow(BaseException):
    """A second signal came."""


class Stop:
    """While it is entered, signals are counted instead of ending the process.

    Attributes:
        signal: the number of the first one; 0 as long as none came.
    """

    def __init__(self, said: str, quiet: bool = False) -> None:
        """``said`` is a line for the first signal, on standard error unless ``quiet``."""
        self.signal = 0
        self._said = b"" if quiet else f"\n{said}\n".encode()
        self._before: dict[int, Any] = {}

    @property
    def code(self) -> int:
        """The exit code that shells expect: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.signal

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other thread may
            for number in _SIGNALS:
                # Who started this process may have it ignore a signal, as `nohup` and a shell's `&` do.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, _: FrameType | None) -> None:
        if self.signal:
            raise StopNow
        self.signal = number
        if self._said:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, self._said)  # print may be what was interrupted
