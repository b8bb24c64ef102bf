"""What tests of the commands share."""

from __future__ import annotations

from click.testing import Result


def one_line_error(result: Result, code: int, *words: str) -> None:
    """``gtr-export`` ended with ``code`` and a last line that has every word."""
    assert result.exit_code == code, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("gtr-export")
    for word in words:
        assert word in last
