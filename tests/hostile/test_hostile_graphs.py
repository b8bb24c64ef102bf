"""Graphs that somebody else made, to do harm: none is run, or what it gives is refused, in one line."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import wire_cases
from click.testing import Result
from commands import runner
from graph_cases import CASES, SECRET, Copy, external, showing, sound, spoil
from graph_liars import BOMBS, LIARS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from gtr_deploy.calibration.quantised_bundle import quantise_bundle
from gtr_deploy.calibration.request import CalibrationRequest
from gtr_deploy.runtime.backends.openvino import backend as openvino_backend
from gtr_deploy.runtime.bundle.graph_file import MESSAGES, check_graph
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import BundleError

pytestmark = pytest.mark.hostile

BACKENDS = ("onnxruntime", "openvino")
SHORT = (
    "--plan", "gtr-fast", "--stage-steps", "1,1,2", "--generation-diffusion", "2", "--reconstruction-diffusion", "2",
    "--fts-diffusion", "3", "--threads", "1",
)  # fmt: skip
SECONDS, GROWTH = 20, 2 * 2**20  # KiB
CLI = Callable[..., Result]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where a test works; emptied at once, since a bundle has 10 MB."""
    yield tmp_path
    subprocess.run(["rm", "-r", str(tmp_path)], check=True)


def _generate(run: CLI, place: Path, backend: str = "onnxruntime") -> Result:
    out = place / "out"
    return run("generate", place / "bundle", "--classes", "3", "--out", out, "--backend", backend, *SHORT)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies below a folder, with what changes when it is written to."""
    found = ((path, path.lstat()) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return {str(path): (status.st_size, status.st_mtime_ns) for path, status in found}


def _refused(call: Callable[[], Result], place: Path, *words: str) -> str:
    """The line that it ended with. Nothing was written, in bounded time and memory."""
    before, start, peak = _files(place), time.process_time(), _peak()
    result = call()
    assert time.process_time() - start < SECONDS
    assert _peak() - peak < GROWTH
    after = _files(place)
    after.pop(str(place / "out" / "run.json"), None)  # what says that a run was begun
    assert after == before
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code in (1, 2), result.output[-1000:]
    assert SECRET[:9].decode() not in result.output
    line = result.stderr.splitlines()[-1]
    _check_line(line.replace(str(place), ""))
    assert "unforeseen" not in line
    for word in words:
        assert word in line
    return line


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_there_are_enough_of_them() -> None:
    assert len(CASES) + len(LIARS) + len(BOMBS) >= 200


@pytest.mark.parametrize("name", CASES)
def test_what_looking_finds_out(name: str, run_cli: CLI, digits_bundle: Path, place: Path) -> None:
    copy = spoil(digits_bundle, place / "bundle", place / "secret.bin", CASES[name])
    _refused(lambda: _generate(run_cli, place), place)
    if name not in LIBRARYS_WORD:
        with pytest.raises(BundleError):
            Bundle.load(copy.folder).graph_files(checksums=name.endswith("in-place-of-the-listed"))


LIBRARYS_WORD = {"operator-that-is-unknown", "operator-with-missing-input"}
"""ONNX Runtime's refusals; of these graphs it reads the file that was looked through, and no other."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIARS)
def test_what_shows_when_it_runs(name: str, backend: str, run_cli: CLI, digits_bundle: Path, place: Path) -> None:
    spoil(digits_bundle, place / "bundle", place / "secret.bin", LIARS[name])
    _refused(lambda: _generate(run_cli, place, backend), place)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BOMBS)
def test_what_wants_all_memory(name: str, backend: str, digits_bundle: Path, place: Path) -> None:
    """In a process of its own, with 6 GB of addresses."""
    spoil(digits_bundle, place / "bundle", place / "secret.bin", BOMBS[name])
    program = (
        "import resource, sys; from gtr_deploy.runtime.cli import main; "
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); main(sys.argv[1:], prog_name='gtr-run')"
    )

    peak = 0

    def call() -> Result:
        nonlocal peak
        arguments = ["generate", str(place / "bundle"), "--classes", "3", "--out", str(place / "out")]
        command = [sys.executable, "-c", program, *arguments, "--backend", backend, *SHORT]
        watcher = (
            "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", watcher, *command], capture_output=True, timeout=60, check=False)
        peak = int(done.stdout.split()[-1])
        parts = {"stdout_bytes": done.stdout, "stderr_bytes": done.stderr, "output_bytes": done.stdout + done.stderr}
        return Result(runner(), return_value=None, exit_code=done.returncode, exception=None, exc_info=None, **parts)

    _refused(call, place)
    assert 0 < peak < GROWTH


COMMANDS: dict[str, tuple[str, ...]] = {
    "bench": ("bench", "BUNDLE", "--backend", "onnxruntime", "--repeat", "1", *SHORT),
    "engine": (
        "engine", "BUNDLE", "--engine", "tensorrt-rtx", "--compute-capability", "8.9",
        "--plans", "gtr-fast", "--max-batch", "1", "--optimization-level", "0",
    ),
    "calibrate": (
        "calibrate", "BUNDLE", "--out", "OUT", "--calibration-images", "1", "--compared-images", "1",
        "--calibration-plan", "gtr-fast", "--keep", "0", "--threads", "1",
    ),
}  # fmt: skip


def _filled(command: str, place: Path) -> list[str | Path]:
    return [{"BUNDLE": place / "bundle", "OUT": place / "out"}.get(word, word) for word in COMMANDS[command]]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name", ["external-parent", "operator-of-a-stranger", "image-twice", "subgraph-loop", "bytes-garbage"]
)
def test_other_commands(
    name: str, command: str, run_cli: CLI, export_cli: CLI, digits_bundle: Path, place: Path
) -> None:
    spoil(digits_bundle, place / "bundle", place / "secret.bin", CASES[name])
    if command == "engine":
        pytest.importorskip("tensorrt_rtx")
    run = run_cli if command == "bench" else export_cli
    _refused(lambda: run(*_filled(command, place)), place, "graphs/decoder.onnx: ")


@pytest.mark.parametrize("name", ["z-nan", "z-flat", "x-next-one-row", "score-scalar"])
@pytest.mark.parametrize("command", ["bench", "calibrate"])
def test_other_commands_see_what_shows_when_it_runs(
    command: str, name: str, run_cli: CLI, export_cli: CLI, digits_bundle: Path, place: Path
) -> None:
    spoil(digits_bundle, place / "bundle", place / "secret.bin", LIARS[name])
    run = run_cli if command == "bench" else export_cli
    result = run(*_filled(command, place))
    assert result.exit_code == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert len(line.replace(str(place), "")) <= 300
    assert "unforeseen" not in line
    assert not (place / "out").exists()


def test_inspect_opens_no_graph(export_cli: CLI, digits_bundle: Path, place: Path) -> None:
    """It shows the manifest; a graph that cannot even be opened does not matter."""
    copy = spoil(digits_bundle, place / "bundle", place / "secret.bin", CASES["model-is-a-pipe"])
    result = export_cli("inspect", copy.folder)
    assert result.exit_code == 0, result.output
    assert SECRET[:9].decode() not in result.output


def _with_listed_data(copy: Copy) -> None:
    copy.list_data(b"\x07" * 3072)
    copy.put(showing(external("decoder.onnx.data")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_data_file_that_is_listed_is_read(backend: str, run_cli: CLI, digits_bundle: Path, place: Path) -> None:
    """So the cases above are refused for what is wrong with them."""
    spoil(digits_bundle, place / "bundle", place / "secret.bin", _with_listed_data)
    assert _generate(run_cli, place, backend).exit_code == 0
    (picture,) = (place / "out").glob("*.png")
    assert Image.open(picture).tobytes() == b"\x07" * 3072


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["replaced", "linked", "written to"])
def test_a_data_file_that_is_swapped_after_it_was_compared(
    how: str, backend: str, run_cli: CLI, digits_bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = spoil(digits_bundle, place / "bundle", place / "secret.bin", _with_listed_data)
    data = copy.graphs / "decoder.onnx.data"
    opened: list[str] = []

    def swapping(real: Callable[..., Any]) -> Callable[..., Any]:
        def open_graph(*arguments: Any, **options: Any) -> Any:
            opened.append(how)
            if len(opened) == 1:  # all have been compared, the decoder is not open
                if how == "written to":
                    data.write_bytes(SECRET[:3072])
                else:
                    data.unlink()
                    data.symlink_to(copy.secret) if how == "linked" else data.write_bytes(SECRET[:3072])
            return real(*arguments, **options)

        return open_graph

    if backend == "onnxruntime":
        monkeypatch.setattr(onnxruntime, "InferenceSession", swapping(onnxruntime.InferenceSession))
    else:
        monkeypatch.setattr(openvino_backend, "read_onnx", swapping(openvino_backend.read_onnx))
    result = _generate(run_cli, place, backend)
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    # Links that lead out of the folder are refused by the libraries, too.
    assert "was changed while the bundle was being opened" in line or how == "linked"
    assert not list((place / "out").glob("*"))


# The reader itself.
def _check_line(line: str) -> None:
    assert len(line) <= 300
    assert line.isprintable()


def _check(content: bytes, kind: str, folder: Path) -> None:
    entry = Bundle.load(folder).graphs[kind]
    check_graph(content, entry.inputs, entry.outputs, entry.opset)


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_bytes(digits_bundle: Path, content: bytes) -> None:
    with pytest.raises(BundleError):
        _check(content, "decoder", digits_bundle)


_FIELDS = st.recursive(
    st.one_of(
        st.builds(wire_cases.wire, st.integers(0, 30), st.just(2), st.binary(max_size=8)),
        st.builds(wire_cases.wire, st.integers(0, 30), st.integers(0, 7), st.binary(max_size=9)),
        st.builds(lambda number, value: wire_cases.wire(number, 0, wire_cases.varint(value)),
                  st.integers(1, 20), st.integers(0, 2**70)),
    ),
    lambda inner: st.builds(wire_cases.wire, st.integers(1, 20), st.just(2), st.lists(inner, max_size=5).map(b"".join)),
    max_leaves=20,
)  # fmt: skip


@given(st.lists(_FIELDS, max_size=6), st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_fields(digits_bundle: Path, parts: list[bytes], in_graph: bool) -> None:
    more = b"".join(parts)
    try:
        _check(wire_cases.appended(**{"in_graph" if in_graph else "in_model": more}), "decoder", digits_bundle)
    except BundleError as error:
        _check_line(str(error))


@given(st.sampled_from(["decoder", "select_rows", "gather_rows", "merge_rows"]), st.integers(0), st.integers(1, 255))
@example("decoder", 0, 255)
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_any_flipped_byte(digits_bundle: Path, kind: str, at: int, flip: int) -> None:
    content = bytearray((digits_bundle / "graphs" / f"{kind}.onnx").read_bytes())
    content[at % len(content)] ^= flip
    try:
        _check(bytes(content), kind, digits_bundle)
    except BundleError as error:
        _check_line(str(error))


@pytest.mark.parametrize("message", MESSAGES)
def test_the_table_of_messages_is_onnxs_own(message: str) -> None:
    found: Any = onnx
    for name in message.split("."):
        found = getattr(found, name)
    known = {field.number: field for field in found.DESCRIPTOR.fields}
    kinds = {
        field.TYPE_FLOAT: "float", field.TYPE_DOUBLE: "double", field.TYPE_BYTES: "bytes", field.TYPE_STRING: "bytes",
    } if (field := next(iter(known.values()))) else {}  # fmt: skip
    for number, (name, kind) in MESSAGES[message].items():
        field = known[number]
        assert field.name == name
        assert field.is_repeated == kind.startswith("*")
        kind = kind.lstrip("*")
        if field.message_type is None:
            assert kind == kinds.get(field.type, "int")
        else:
            assert kind in ("bytes", field.message_type.full_name.removeprefix("onnx."))


def test_what_the_project_writes_passes(digits_bundle: Path, build_digits: Callable[[str], Path], place: Path) -> None:
    few: dict[str, Any] = {"images": 1, "compared": 1, "keep": 0, "plan": "gtr-fast", "threads": 1}
    quantise_bundle(CalibrationRequest(digits_bundle, place / "int8", **few), Reporter(quiet=True))
    for folder in (digits_bundle, place / "int8"):
        for target in ("tensorrt", "cpu"):
            assert len(Bundle.load(folder).graph_files(target=target)) == 8


def test_the_sound_decoder_is_sound(run_cli: CLI, digits_bundle: Path, place: Path) -> None:
    spoil(digits_bundle, place / "bundle", place / "secret.bin", lambda copy: copy.put(sound()))
    assert _generate(run_cli, place).exit_code == 0
    assert os.listdir(place / "out")


def test_a_link_to_a_graph_is_no_change(digits_bundle: Path, place: Path) -> None:
    """Another build may link to this bundle's files while they are being opened."""
    shutil.copytree(digits_bundle, place / "bundle")
    (graph, *_) = Bundle.load(place / "bundle").graph_files().values()
    (place / "link").hardlink_to(graph.path)
    graph.confirm()
    content = graph.path.read_bytes()
    status = graph.path.stat()
    graph.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(graph.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match="was changed while"):
        graph.confirm()
