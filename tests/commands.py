"""What tests of the commands share."""

from __future__ import annotations

import inspect

from click.testing import CliRunner, Result


def runner() -> CliRunner:
    """Keeps the two streams apart, which click 8.1 does only when it is told to."""
    told = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    return CliRunner(**told)


def one_line_error(result: Result, code: int, *words: str) -> None:
    """``gtr-export`` ended with ``code`` and a last line that has every word."""
    assert result.exit_code == code, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("gtr-export")
    for word in words:
        assert word in last
