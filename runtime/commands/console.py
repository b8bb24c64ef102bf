"""What both commands say to people: one-line errors, tables, progress on a terminal and plain lines elsewhere.

Results go to standard output, everything else to standard error, so that ``--json`` output can be piped.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ..errors import GtrError, UsageError, printable
from . import terminal
from .stop import Terminated, terminable

DEBUG_VARIABLE = "GTR_DEBUG"
"""Set to anything, it shows the traceback of an error that nobody foresaw."""


_LONGEST_LINE = 2000  # of what is printed: names in it may be somebody else's


class CommandGroup(click.Group):
    """A click group whose every error is one line: exit 2 for bad usage, 1 for failure, 130 for Ctrl-C, 143 for
    SIGTERM."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        terminal.prepare()
        kwargs["standalone_mode"] = False
        name = kwargs.get("prog_name") or self.name or "gtr"
        try:
            with terminable():
                code = super().main(*args, **kwargs)
        except click.UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # which click 8.1 does not have
                click.echo(error.format_message())
                sys.exit(2)
            command = error.ctx.command_path if error.ctx else name
            click.echo(f"{command}: {_one_line(error.format_message())} (see {command} --help)", err=True)
            code = 2
        except UsageError as error:
            click.echo(f"{name}: {_one_line(str(error))}", err=True)
            code = 2
        except (GtrError, click.ClickException) as error:
            click.echo(f"{name}: {_one_line(str(error))}", err=True)
            code = 1
        except OSError as error:
            click.echo(f"{name}: {error.filename or 'file error'}: {error.strerror or error}", err=True)
            code = 1
        except (KeyboardInterrupt, click.Abort) as error:
            stopped = error.__cause__ if isinstance(error, click.Abort) else error
            line = f"; {stopped.args[0]}" if stopped and stopped.args else ""
            click.echo(f"{name}: stopped{line}", err=True)
            code = 143 if isinstance(stopped, Terminated) else 130
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            what = _one_line(f"{type(error).__name__}: {error}")[:200]
            click.echo(f"{name}: unforeseen error, {what}; {DEBUG_VARIABLE}=1 shows where", err=True)
            code = 1
        sys.exit(code if isinstance(code, int) else 0)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Whole first sentences, where click cuts them."""
        named = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(limit=1000)) for name, command in named if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()), _LONGEST_LINE)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2))


def echo(text: str, indent: str = "") -> None:
    """A line on standard output, wrapped where a terminal is narrower; ``indent`` begins the lines after the first."""
    click.echo(terminal.wrapped(text, terminal.columns(sys.stdout), indent))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on standard output, its title in a line above; columns of numbers are right-aligned.

    Where a terminal is narrower, headings and then the widest columns wrap, between words. What does not fit then runs
    over.
    """
    from rich.cells import cell_len

    def widest(texts: Iterable[str]) -> int:
        return max(map(cell_len, texts), default=0)

    rows = [["\n".join(printable(line, _LONGEST_LINE) for line in cell.split("\n")) for cell in row] for row in rows]
    if title:
        echo(printable(title, _LONGEST_LINE))
    numeric = [all(map(_looks_numeric, cells)) for cells in zip(*rows, strict=True)] or [False] * len(columns)
    limit = terminal.columns(sys.stdout)
    table, gap = [list(columns), *rows], 3
    widths = [widest("\n".join(cells).split("\n")) for cells in zip(*table, strict=True)]

    if limit is not None and sum(widths) + gap * (len(columns) - 1) > limit:
        gap = 2
        room = limit - gap * (len(columns) - 1)
        least = [widest("\n".join(cells).split()) for cells in zip(*table, strict=True)]
        bodies = [widest("\n".join(cells).split("\n")) for cells in zip(*rows, strict=True)]
        for index, body in enumerate(bodies):  # headings first
            widths[index] = max(least[index], body, widths[index] - max(0, sum(widths) - room))
        while sum(widths) > room and (able := [i for i in range(len(widths)) if widths[i] > least[i]]):
            widths[max(able, key=lambda index: widths[index])] -= 1
        table = [[terminal.wrapped(cell, width) for cell, width in zip(row, widths, strict=True)] for row in table]

    def line(cells: Sequence[str]) -> str:
        sides = zip(cells, widths, numeric, strict=True)
        padded = [" " * (w - cell_len(c)) + c if right else c + " " * (w - cell_len(c)) for c, w, right in sides]
        return (" " * gap).join(padded).rstrip()

    def whole(row: Sequence[str]) -> list[str]:
        return [line(cells) for cells in itertools.zip_longest(*(cell.split("\n") for cell in row), fillvalue="")]

    lines = [
        *whole(table[0]),
        "─" * (sum(widths) + gap * (len(columns) - 1)),
        *(one for row in table[1:] for one in whole(row)),
    ]
    click.echo("\n".join(["", *lines, ""]))


def _looks_numeric(text: str) -> bool:
    if text.count(" ") > 3:  # a sentence that begins with a number
        return False
    return not text or text[0].isdigit() or (text[0] in "-+<." and text[1:2].isdigit())


class Reporter:
    """Progress of long work, on standard error.

    On a terminal a live line with elapsed time; elsewhere plain lines. ``quiet`` says nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not quiet
        self._shown: Any = None  # the live display that is running

    def say(self, text: str) -> None:
        """One line, wrapped where a terminal is narrower; above the live display, if one is running."""
        text = terminal.wrapped(text, terminal.columns(sys.stderr))
        if self._shown is not None:
            self._shown.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        elif not self._quiet:
            click.echo(text, err=True)

    @contextmanager
    def _display(self, *columns: Any) -> Iterator[Any]:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            outer, self._shown = self._shown, progress
            try:
                yield progress
            finally:
                self._shown = outer

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A phase of unknown length: shown while it runs, with its seconds at the end."""
        start = time.monotonic()
        if self._live:
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            with self._display(*columns) as progress:
                progress.add_task(name, total=None)
                yield
        else:
            self.say(f"{name} ...")
            yield
        self.say(f"{name}: {time.monotonic() - start:.1f} s")

    @contextmanager
    def bar(self, name: str, total: int, unit: str = "") -> Iterator[Progressed]:
        """A phase of known length. Yields an object whose ``to(done)`` is called as it advances."""
        if self._live:
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with self._display(*columns) as progress:
                task = progress.add_task(name, total=total)
                yield Progressed(lambda done: progress.update(task, completed=done))
        else:
            start, shown = time.monotonic(), [0]

            def line(done: int) -> None:
                tenth = 10 * done // max(total, 1)
                if tenth > shown[0] and done < total:
                    shown[0] = tenth
                    self.say(f"{name}: {done}/{total} {unit} ({time.monotonic() - start:.0f} s)")

            yield Progressed(line)

    @contextmanager
    def phases(self, name: str) -> Iterator[Phases]:
        """Nested phases of one piece of work, with elapsed times; elsewhere than on a terminal the outermost only."""
        if not self._live:
            yield Phases(lambda phase: self.say(f"{name}: {phase} ..."))
            return
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TimeElapsedColumn())
        with self._display(*columns) as progress:
            progress.add_task(name, total=None)
            yield Phases(None, progress)


class Phases:
    """Handle of running phases; may be called from any thread."""

    def __init__(self, say: Callable[[str], None] | None, progress: Any = None) -> None:
        self._say, self._progress = say, progress
        self._open: dict[str, tuple[int, Any]] = {}

    def start(self, name: str, parent: str | None = None, steps: int = 0) -> None:
        """A phase inside ``parent`` begins; 0 steps where their number is unknown."""
        depth = self._open[parent][0] + 1 if parent in self._open else 1
        task = None
        if self._progress is not None:
            task = self._progress.add_task("  " * depth + name, total=steps or None)
        elif depth == 1 and self._say is not None:
            self._say(name)
        self._open[name] = (depth, task)

    def step(self, name: str, done: int) -> None:
        """``done`` steps of a phase are done."""
        if self._progress is not None and name in self._open:
            self._progress.update(self._open[name][1], completed=done)

    def finish(self, name: str) -> None:
        """A phase ends."""
        _, task = self._open.pop(name, (0, None))
        if task is not None:
            self._progress.remove_task(task)


class Progressed:
    """Handle of a running bar."""

    def __init__(self, update: Any) -> None:
        self._update = update
        self._done = 0

    def to(self, done: int) -> None:
        """``done`` units are done in all."""
        self._done = done
        self._update(done)

    def advance(self, count: int = 1) -> None:
        """``count`` more units are done."""
        self.to(self._done + count)
