"""Ctrl-C and SIGTERM in the middle of every long command: one line, the shell's exit code, no temporary file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from generating import pictures

from gtr_deploy.runtime.bundle.reader import Bundle

ONE = ("--threads", "1")
#: The command; what it says on standard error when the signal comes; what is said of what is kept.
LONG: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "build": (
        "export", ("build", "--model", "mar-digits", "--out", "new"), "export diffusion_step (fp32) ...",
        "finished stages are kept; the same command goes on from there",
    ),
    "calibrate": (
        "export", ("calibrate", "b", "--out", "new", "--calibration-images", "64", *ONE), "calibrat",
        "finished stages are kept; the same command goes on from there",
    ),
    "sensitivity": (
        "export", ("sensitivity", "b", "--calibration-images", "64", *ONE), "calibrat",
        "nothing is kept; the same command starts again",
    ),
    "verify": ("export", ("verify", "b"), "parity: ", "nothing is written; the same command starts again"),
    "bench": (
        "runtime", ("bench", "b", "--repeat", "100", *ONE), "plan gtr, batch 1",
        "nothing is kept; the same command starts again",
    ),
    "compare": (
        "runtime", ("compare", "b", "--classes", "0-9", "--plans", "mar,gtr", *ONE), "plan mar",
        "nothing is drawn; the same command starts again",
    ),
    "evaluate": (
        "runtime", ("evaluate", "b", "--images", "300", "--plan", "gtr-fast", *ONE), "300 images, plan gtr-fast: 3",
        "nothing is kept; with --save-images FOLDER the same command goes on where it stopped",
    ),
    "evaluate, saved": (
        "runtime", ("evaluate", "b", "--images", "300", "--plan", "gtr-fast", "--save-images", "kept", *ONE),
        "300 images, plan gtr-fast: 3",
        "finished images are in kept; the same command goes on from there",
    ),
    "generate, before the first image": (
        "runtime", ("generate", "b", "--classes", "all", "--out", "out", *ONE), "load b ...",
        "nothing was made yet; the same command starts again",
    ),
}  # fmt: skip


@pytest.fixture
def place(digits_bundle: Path, tmp_path: Path) -> Path:
    (tmp_path / "b").symlink_to(digits_bundle)
    return tmp_path


def _started(place: Path, part: str, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", f"gtr_deploy.{part}.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place / "tmp")}
    (place / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        command, cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def _stopped(process: subprocess.Popen[str], number: signal.Signals, at: str) -> tuple[str, str]:
    """What it said in all, and the last line, once a signal has ended it after it had said ``at``."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith(at):
            break
    time.sleep(0.05)
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    return said + rest, rest.splitlines()[-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("name", LONG)
def test_stopped(name: str, number: signal.Signals, code: int, place: Path) -> None:
    part, arguments, at, kept = LONG[name]
    before = set(Bundle.load(place / "b").folder.rglob("*"))
    process = _started(place, part, arguments)
    said, last = _stopped(process, number, at)
    assert process.returncode == code, said
    assert last.endswith(f": stopped; {kept}")
    assert "Traceback" not in said
    assert "Exception" not in said
    assert not list((place / "tmp").iterdir())
    assert set(Bundle.load(place / "b").folder.rglob("*")) == before
    assert not [path for path in place.rglob(".gtr-*") if path.name.startswith(".gtr-")]
    if name == "build":
        assert not (place / "new").exists()
        assert (place / "new.partial" / "graphs" / "backbone.onnx").is_file()
    if name == "evaluate, saved":
        assert pictures(place / "kept")


def test_ignored_signals_stay_ignored(place: Path) -> None:
    """Who started the command may not want it to end (nohup, a shell's trap)."""
    ignoring = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); from gtr_deploy.runtime.cli import main; "
        "main(['bench', 'b', '--repeat', '3', '--threads', '1'], prog_name='gtr-run')"
    )
    command = [sys.executable, "-u", "-c", ignoring]
    ended = subprocess.Popen(command, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ended.stderr is not None
    for line in ended.stderr:
        if line.startswith("plan gtr"):
            break
    ended.send_signal(signal.SIGTERM)
    out, _ = ended.communicate(timeout=60)
    assert ended.returncode == 0
    assert "median s" in out


def test_what_is_said_is_the_innermost_line() -> None:
    from gtr_deploy.runtime.commands.stop import Terminated, if_stopped, raise_for

    steps: list[Callable[[], str] | str] = [lambda: "inner"]
    with pytest.raises(Terminated) as caught, if_stopped("outer"), if_stopped(steps[0]):
        raise_for(signal.SIGTERM)
    assert caught.value.args == ("inner",)
