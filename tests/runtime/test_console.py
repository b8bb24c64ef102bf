"""Errors in one line with the right exit code; progress that suits a terminal and a log."""

from __future__ import annotations

import sys
from typing import NoReturn

import click
import pytest
from commands import runner

from gtr_deploy.runtime.commands.console import CommandGroup, Reporter, print_table
from gtr_deploy.runtime.errors import BundleError, PlanError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BundleError("two\nlines"), 1, "tool: two lines\n"),
        (PlanError("cfg is odd"), 2, "tool: cfg is odd\n"),
        (click.UsageError("no such thing"), 2, "tool: no such thing (see tool --help)\n"),
        (click.ClickException("broken"), 1, "tool: broken\n"),
        (FileNotFoundError(2, "No such file", "x.png"), 1, "tool: x.png: No such file\n"),
        (KeyboardInterrupt(), 130, "tool: stopped\n"),
        (click.Abort(), 130, "tool: stopped\n"),
    ],
)
def test_every_error_is_one_line(error: BaseException, code: int, line: str) -> None:
    @click.group(cls=CommandGroup, name="tool")
    def group() -> None:
        pass

    @group.command()
    def run() -> NoReturn:
        raise error

    result = runner().invoke(group, ["run"], prog_name="tool")
    assert result.exit_code == code
    # click ends the terminal's own ^C line first.
    assert result.stderr.replace("tool run", "tool").lstrip("\n") == line


def test_unforeseen_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.group(cls=CommandGroup, name="tool")
    def group() -> None:
        pass

    @group.command()
    def run() -> NoReturn:
        raise ZeroDivisionError("by\n\x1b[0mnought")

    result = runner().invoke(group, ["run"])
    assert result.exit_code == 1
    assert result.stderr == "tool: unforeseen error, ZeroDivisionError: by \\x1b[0mnought; GTR_DEBUG=1 shows where\n"
    monkeypatch.setenv("GTR_DEBUG", "1")
    assert isinstance(runner().invoke(group, ["run"]).exception, ZeroDivisionError)


def test_plain_progress(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    with reporter.stage("load"):
        pass
    with reporter.bar("work", 20, "steps") as bar:
        for _ in range(20):
            bar.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "load ..."
    assert lines[1].startswith("load: 0.")
    assert len(lines) == 2 + 9
    assert lines[2].startswith("work: 2/20 steps")


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=True)
    with reporter.stage("load"), reporter.bar("work", 2) as bar:
        bar.to(2)
    reporter.say("hello")
    assert capsys.readouterr() == ("", "")


def test_live_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    reporter = Reporter()
    with reporter.stage("load"):
        pass
    with reporter.bar("work", 3, "steps") as bar:
        bar.to(3)
    error = capsys.readouterr().err
    assert "load" in error
    assert "work" in error


def test_tables_are_never_cut_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 150
    print_table(["name", "value"], [[long, "1.5"], ["b", "-2"]], title="t")
    assert long in capsys.readouterr().out


def test_narrow_terminals_break_no_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    numbers = [f"{n}.123456" for n in range(6)]
    print_table([*"abcdef", "note"], [[*numbers, "a long note " * 5]])
    lines = click.unstyle(capsys.readouterr().out).splitlines()
    assert any(all(number in line for number in numbers) for line in lines)
    assert max(len(line) for line in lines) < 110


def test_live_progress_takes_brackets_for_brackets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = "/tmp/x[/y]"  # to rich, a closing tag that nothing opened
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    reporter = Reporter()
    with reporter.stage(f"load {folder}"), reporter.bar(f"work in {folder}", 3, "steps") as bar:
        bar.to(3)
    with reporter.phases(f"build {folder}") as phases:
        phases.start(f"part {folder}")
    assert f"load {folder}: 0." in capsys.readouterr().err


LONG_PATH = "/tmp/" + "/".join(f"a-rather-long-folder-name-{n}" for n in range(6)) + "/manifest.json"
COMMAND = "gtr-export engine bundles/mar-h-fp16 --engine tensorrt"


@pytest.mark.parametrize("columns", ["20", "40", "80", "200"])
@pytest.mark.parametrize("terminal", ["", "xterm", "dumb"])
@pytest.mark.parametrize("path", [LONG_PATH, "/tmp/日本語のとても長いフォルダー/模型"])
def test_no_path_or_identifier_is_broken(
    columns: str, terminal: str, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: bool(terminal))
    monkeypatch.setenv("TERM", terminal)
    if terminal:
        monkeypatch.setenv("COLUMNS", columns)
    else:
        monkeypatch.delenv("COLUMNS", raising=False)
    prose = f"the graphs in {path} differ from what the manifest says; {COMMAND} builds them again"
    print_table(["what", "detail"], [[path, prose], ["tensorrt-rtx-1.7.1.116-sm89", "ok"]], title=f"of {path}")
    output = click.unstyle(capsys.readouterr().out)
    assert " ".join(output.split()).startswith(f"of {path} ")
    assert output.count(path) == 3
    for word in (*COMMAND.split(), "tensorrt-rtx-1.7.1.116-sm89"):
        assert word in output.split()
    if not terminal:
        assert prose in output
