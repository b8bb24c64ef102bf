"""A graph that never ends is reported: no engine library can be interrupted in the middle of a call."""

from __future__ import annotations

import os
import threading
import time
import weakref

import click

from ..backends.protocol import Backend
from ..errors import UsageError

VARIABLE = "GTR_CALL_LIMIT"
SECONDS = 1800.0
"""A call of one graph; the largest batches on the slowest machines stay far below."""


def watch_calls(backend: Backend) -> None:
    """Ends the process with a line and exit code 1 when one call takes longer than $GTR_CALL_LIMIT seconds.

    Raises:
        UsageError: the variable is not a number of seconds.
    """
    text = os.environ.get(VARIABLE, str(SECONDS))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0.1 <= limit <= 1e7:
        raise UsageError(f"{VARIABLE}={text} is not a number of seconds")
    # Weakly: this must not keep a backend in memory that nobody uses any more.
    threading.Thread(target=_watch, args=(weakref.ref(backend), limit), daemon=True).start()


def _watch(watched: weakref.ref[Backend], limit: float) -> None:
    while (backend := watched()) is not None:
        calling = getattr(backend, "calling", None)
        if calling is not None and time.monotonic() - calling[1] > limit:
            click.echo(
                f"the {calling[0]} graph has been running for more than {limit:g} s on backend {backend.name}; "
                f"{VARIABLE} sets the limit",
                err=True,
            )
            os._exit(1)
        del backend
        time.sleep(min(5.0, limit / 2))
