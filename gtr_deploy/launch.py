"""Where the commands start. Ctrl-C ends them quietly from here on, long before there is a command that listens."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def gtr_run() -> None:
    """gtr-run."""
    from .runtime.cli import main

    _listen()
    main()


def gtr_export() -> None:
    """gtr-export."""
    from .export.cli import main

    _listen()
    main()


def _listen() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
