"""kill -9 before every change of the file system: nothing is lost, the next run completes, nothing is left over."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gtr_deploy.runtime.bundle.reader import Bundle

pytestmark = pytest.mark.hostile

SERVER = Path(__file__).with_name("fork_server.py")
SHORT = (
    "--plan", "gtr-fast", "--stage-steps", "1,1,2", "--generation-diffusion", "2", "--reconstruction-diffusion", "2",
    "--fts-diffusion", "3", "--threads", "1", "--backend", "onnxruntime",
)  # fmt: skip
FEW = ("--calibration-images", "1", "--compared-images", "1", "--calibration-plan", "gtr-fast", "--threads", "1")

Tree = dict[str, str]


class Server:
    """Runs commands in children of one process that has everything imported (fork_server.py)."""

    def __init__(self, ready: Path, scratch: Path) -> None:
        command = [sys.executable, str(SERVER), str(ready), str(scratch)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, **asked: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"status"'):  # what the first run of a command says comes before
                return json.loads(line)
        raise AssertionError("the fork server is gone")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def server(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(digits_bundle, tmp_path_factory.mktemp("scratch"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def calibrated(server: Server, digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 bundle; from now on the server remembers what a calibration computes."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    argv = ["calibrate", str(digits_bundle), "--precision", "int8", *FEW, "--out", str(out), "--keep", "1"]
    assert server.ask(argv=argv, warm=True)["status"] == 0
    return out


def _tree(root: Path) -> Tree:
    """Everything below a folder, with digests of files."""
    found = {}
    for path in sorted(root.rglob("*")):
        kind = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(root).as_posix()] = kind
    return found


def _neighbours(root: Path) -> None:
    """What is not ours, under names that a build could think of."""
    for name in ("out.old", "out.fp32", "out.bak"):
        (root / name).mkdir(parents=True)
        (root / name / "letter.txt").write_text("mine", encoding="utf-8")
    (root / "letter.txt").write_text("mine", encoding="utf-8")


def _sound(out: Path) -> bool:
    bundle = Bundle.load(out)
    bundle.graph_paths()
    bundle.graph_paths(target="cpu")
    for engines in bundle.engine_sets:
        bundle.engine_paths(engines)
    return True


def _explore(
    server: Server,
    root: Path,
    argv: list[str],
    prepare: Callable[[], Any],
    check: Callable[[], Any],
    last: int | None = None,
) -> list[str]:
    """Kills the command before each of its changes; returns what they were.

    Args:
        root: the folder that all happens in.
        prepare: fills it.
        check: whether what a kill has left is good for use.
        last: only that many of the changes; all if None.
    """

    def run(kill: int) -> dict[str, Any]:
        return server.ask(argv=argv, kill=kill, root=str(root))

    def afresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        _neighbours(root)
        prepare()

    afresh()
    foreign = _tree(root)
    whole = run(0)
    assert whole["status"] == 0, whole["output"]
    wanted = _tree(root)
    kept = {name: kind for name, kind in foreign.items() if name.split("/")[0] != "out"}
    assert kept.items() <= wanted.items()
    assert {name.split("/")[0] for name in wanted.keys() - kept.keys()} <= {"out", "grid.png"}
    for number, point in list(enumerate(whole["points"], start=1))[-(last or 0) :]:
        where = f"killed before change {number} of {len(whole['points'])}, {point}"
        afresh()
        killed = run(number)
        assert killed["status"] == -9, f"{where}: {killed['output']}"
        assert killed["points"][-1].split()[0] == point.split()[0], where
        assert check(), where
        again = run(0)
        assert again["status"] == 0, f"{where}: {again['output']}"
        assert _tree(root) == wanted, where
    return whole["points"]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "root"
    shutil.rmtree(tmp_path / "root")


def test_build_over_an_older_bundle(server: Server, digits_bundle: Path, root: Path) -> None:
    out = root / "out"
    before = Bundle.load(digits_bundle).max_batch
    points = _explore(
        server,
        root,
        ["gtr-export", "build", "--model", "mar-digits", "--out", str(out), "--max-batch", "3"],
        lambda: bool(shutil.copytree(digits_bundle, out)),
        lambda: _sound(out) and Bundle.load(out).max_batch in (before, 3),
    )
    assert len(points) >= 60
    assert any(point.startswith("exchange") for point in points)


def test_build_from_nothing(server: Server, digits_bundle: Path, root: Path) -> None:
    out = root / "out"
    points = _explore(
        server,
        root,
        ["gtr-export", "build", "--model", "mar-digits", "--out", str(out)],
        lambda: None,
        lambda: not out.exists() or _sound(out),
    )
    assert len(points) >= 40


def test_calibrate(server: Server, digits_bundle: Path, calibrated: Path, root: Path) -> None:
    out = root / "out"
    command = ["gtr-export", "calibrate", str(digits_bundle), "--precision", "int8", *FEW]
    points = _explore(
        server,
        root,
        [*command, "--out", str(out), "--keep", "0"],
        lambda: bool(shutil.copytree(calibrated, out)),
        lambda: _sound(out) and Bundle.load(out).precision == "int8",
    )
    assert len(points) >= 40


def test_build_of_int8_when_all_but_cleaning_up_is_done(server: Server, calibrated: Path, root: Path) -> None:
    out = root / "out"
    model = (
        "--model",
        "mar-digits",
        "--precision",
        "int8",
        "--calibration-images",
        "1",
        "--calibration-plan",
        "gtr-fast",
    )
    points = _explore(
        server, root, ["gtr-export", "build", *model, "--out", str(out)], lambda: None, lambda: _sound(out), last=14
    )
    assert len(points) >= 150


@pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="needs TensorRT-RTX")
def test_engine(server: Server, digits_bundle: Path, root: Path, tmp_path: Path) -> None:
    out, older = root / "out", tmp_path / "older"
    options = ("--engine", "tensorrt-rtx", "--compute-capability", "8.9")
    shutil.copytree(digits_bundle, older)
    first = server.ask(argv=["gtr-export", "engine", str(older), *options, "--max-batch", "2"], kill=0, root=str(root))
    assert first["status"] == 0, first["output"]
    points = _explore(
        server,
        root,
        ["gtr-export", "engine", str(out), *options, "--max-batch", "1"],
        lambda: bool(shutil.copytree(older, out)),
        lambda: _sound(out),
    )
    shutil.rmtree(older)
    assert len(points) >= 40


def test_generate(server: Server, digits_bundle: Path, root: Path) -> None:
    out, grid = root / "out", root / "grid.png"
    points = _explore(
        server,
        root,
        [
            *("gtr-run", "generate", str(digits_bundle), "--classes", "3,7", "--batch-size", "1", "--resume", *SHORT),
            *("--out", str(out), "--grid", str(grid)),
        ],
        lambda: (out.mkdir(), (out / "letter.txt").write_text("mine")),
        lambda: all(Image.open(picture).load() for picture in root.rglob("[!.]*.png")),
    )
    assert len(points) >= 10
