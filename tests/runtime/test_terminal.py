"""Terminals as people have them: 80 columns, encodings that are not UTF-8; pipes and files. Every command, for real."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from generating import FEW_STEPS
from msgspec import structs

from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands import terminal

QUICK = ("--threads", "1", "--backend", "onnxruntime", *FEW_STEPS)
RUN = {
    "help": ("--help",),
    "plan": ("plan", "b"),
    "plan of the largest": ("plan", "mar-h"),
    "doctor": ("doctor", "b"),
    "generate": ("generate", "b", "--classes", "0-9", "--out", "out", "--grid", "g.png", *QUICK),
    "bench": ("bench", "b", "--plans", "gtr,gtr-fast", "--repeat", "1", *QUICK),
    "compare": ("compare", "b", "--plans", "gtr,gtr-fast", "--classes", "0,9", *QUICK),
    "evaluate": ("evaluate", "d", "--plans", "gtr,gtr-fast", "--images", "20", "--plot", "p.png", *QUICK),
}
EXPORT = {
    "help": ("--help",),
    "inspect": ("inspect", "b"),
    "doctor": ("doctor",),
    "models": ("models",),
    "verify": ("verify", "b", "--plans", "gtr-fast", "--images", "1"),
    "sensitivity": ("sensitivity", "b", "--calibration-plan", "gtr-fast", "--calibration-images", "1",
                    "--compared-images", "1", "--threads", "1"),
    "calibrate": ("calibrate", "b", "--out", "q", "--keep", "0", "--calibration-plan", "gtr-fast",
                  "--calibration-images", "1", "--compared-images", "1", "--threads", "1"),
}  # fmt: skip
COMMANDS = {f"gtr-run {n}": ("runtime", a) for n, a in RUN.items()}
COMMANDS |= {f"gtr-export {n}": ("export", a) for n, a in EXPORT.items()}
NAMES = ("Käse", "Ærø", "日本", "drei · 3", "…", "fünf × 5", "ß", "sieben", "acht", "Ligne ─ │")


@pytest.fixture
def place(digits_bundle: Path, tmp_path: Path) -> Path:
    """A folder with a bundle ``b`` whose classes have names from all over."""
    copied = tmp_path / "b"
    subprocess.run(["cp", "-r", str(digits_bundle), str(copied)], check=True)
    bundle = Bundle.load(copied)
    bundle.with_conditioner(structs.replace(bundle.conditioner, class_names=NAMES))
    (tmp_path / "d").symlink_to(digits_bundle)  # with the digits' own
    return tmp_path


def _command(name: str) -> list[str]:
    part, arguments = COMMANDS[name]
    return [sys.executable, "-m", f"gtr_deploy.{part}.cli", *arguments]


def _environment(**changed: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON", "COLUMNS"))}
    return {**kept, "GTR_DEPLOY_CACHE": "cache", "OMP_NUM_THREADS": "1", **changed}


def _in_a_terminal(command: list[str], place: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code, and what a terminal of 80 columns got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(command, cwd=place, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 65536):
            said += chunk
    except OSError:  # Linux's word for the end
        pass
    os.close(ours)
    return process.wait(60), said.decode()


def _check_lines(said: str) -> None:
    for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)):
        line = line.rstrip()
        assert len(line) <= 80 or " " not in line.strip(), line  # a single word is never broken


@pytest.mark.parametrize("name", COMMANDS)
def test_80_columns_in_a_terminal(name: str, place: Path) -> None:
    code, said = _in_a_terminal(_command(name), place, _environment(TERM="xterm", LC_ALL="C.UTF-8"))
    assert code in (0, 1 if name.endswith("doctor") else 0), said
    _check_lines(said)
    if name.endswith("help"):
        assert "..." not in said.replace("[ARGS]...", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_80_columns_of_ascii_in_a_pipe(name: str, place: Path) -> None:
    environment = _environment(COLUMNS="80", PYTHONUTF8="0", LC_ALL="POSIX")
    result = subprocess.run(_command(name), cwd=place, env=environment, capture_output=True)
    said = (result.stdout + result.stderr).decode("ascii")
    assert result.returncode in (0, 1 if name.endswith("doctor") else 0), said
    _check_lines(said)
    if name == "gtr-export inspect":
        assert "10 classes, Kase to Ligne - |" in said
    if name == "gtr-run generate":
        assert (place / "out" / "class0-Käse-gtr-fast-seed000000.png").exists() or len(os.listdir(place / "out")) == 11


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "Kase"),
        ({"PYTHONIOENCODING": "latin-1"}, "Käse"),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0"}, "Kase"),
        ({"LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "Kase"),
        ({"LANG": "C"}, "Käse"),  # Python itself takes UTF-8 there
        ({"LC_ALL": "C.UTF-8"}, "Käse"),
    ],
)
@pytest.mark.parametrize("to", ["pipe", "file", "terminal"])
def test_encodings(variables: dict[str, str], name: str, to: str, place: Path) -> None:
    command, environment = _command("gtr-export inspect"), _environment(TERM="dumb", **variables)
    encoding = "latin-1" if "latin-1" in variables.values() else "utf-8"
    if to == "terminal" and encoding == "utf-8":
        code, said = _in_a_terminal(command, place, environment)
    else:
        with (place / "said.txt").open("wb+") as file:
            code = subprocess.run(command, cwd=place, env=environment, stdout=file).returncode
            file.seek(0)
            said = file.read().decode(encoding)
    assert code == 0
    assert f"10 classes, {name} to " in said
    assert said.isascii() == (name == "Kase")


def test_paths_that_no_encoding_has(place: Path) -> None:
    """Errors, too; and a path whose bytes are no text at all."""
    for environment in (_environment(LC_ALL="POSIX", PYTHONUTF8="0"), _environment(LC_ALL="C.UTF-8")):
        command = [sys.executable, "-m", "gtr_deploy.runtime.cli", "plan", b"K\xc3\xa4se-\xff"]
        result = subprocess.run(command, cwd=place, env=environment, capture_output=True)
        assert result.returncode == 1
        line = result.stderr.decode()
        assert line.count("\n") == 1
        assert "is not a folder" in line


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Käse", "Kase"), ("Ærø", "AEro"), ("3 × 4 … ±1 → ½", "3 x 4 ... +-1 -> \\xbd"), ("─┼│━╸", "--|--"),
        ("日本", "\\u65e5\\u672c"), ("⠋", "*"), ("\udcc3\udca4", "a"), ("\udcff", "\\udcff"),
    ],
)  # fmt: skip
def test_replacements(text: str, plain: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    sys_stdout, sys.stdout = sys.stdout, stream
    try:
        terminal.prepare()
    finally:
        sys.stdout = sys_stdout
    stream.write(text)
    stream.flush()
    assert stream.buffer.getvalue().decode() == plain  # pyright: ignore[reportAttributeAccessIssue]


def test_wrapping_breaks_no_word() -> None:
    text = "see /a/very/long/path/that/does/not/fit for the rest\nand more"
    lines = terminal.wrapped(text, 20, "  ").split("\n")
    assert lines == ["see", "  /a/very/long/path/that/does/not/fit", "  for the rest", "and more"]
    assert terminal.wrapped(text, None) == text
