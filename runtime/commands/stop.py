"""Ctrl-C and SIGTERM in the middle of long work: the first one asks it to stop where nothing is lost, the second one
stops it at once. Knows nothing of the work."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
