"""Checkpoints as an attacker would make them: one line, soon, in little memory, and nothing runs.

Every file is first read in a process of its own, which may take 20 seconds and 2 GB; what survives that is read here.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import archive_cases
import pickle_cases
import pytest
import torch
from checkpoint_files import TINY, Checkpoint
from click.testing import Result
from commands import one_line_error

from gtr_deploy.export.build.checkpoints import load_mar
from gtr_deploy.export.build.reading import read_checkpoint
from gtr_deploy.runtime.errors import GtrError, printable

pytestmark = pytest.mark.hostile

CASES = {**pickle_cases.CASES, **archive_cases.CASES}
_SECONDS, _BYTES = 20, 2 * 10**9


def bounded(read: Callable[[], object]) -> tuple[str, str]:
    """What reading ended in, in a child of this process: ``read``, ``refused`` or an exception's name; and its text."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_SECONDS)
        taken = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (taken + _BYTES, taken + _BYTES))
        try:
            read()
            ended = ("read", "")
        except GtrError as error:
            ended = ("refused", str(error))
        except BaseException as error:
            ended = (type(error).__name__, str(error)[:200])
        os.write(send, json.dumps(ended).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"ended by signal {os.waitstatus_to_exitcode(status)}"
    ended, text = json.loads(content)
    return ended, text


@pytest.mark.parametrize("name", CASES)
def test_reading(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, words = CASES[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    write(path)
    before = sorted(os.listdir(tmp_path))
    ended, text = bounded(lambda: load_mar(path, TINY))
    assert sorted(os.listdir(tmp_path)) == before, "something ran"
    if words is None:
        assert ended == "read", text
        load_mar(path, TINY)
        return
    assert ended == "refused", f"{ended} {text}"
    assert words in text, text
    assert text.startswith(str(path))
    assert len(text) <= 300
    assert text.isprintable(), text
    with pytest.raises(GtrError):  # again, where coverage sees it
        load_mar(path, TINY)


def test_there_are_many() -> None:
    assert len(CASES) >= 90


@pytest.mark.parametrize("legacy", [False, True])
def test_what_the_cases_spoil_is_sound(tmp_path: Path, legacy: bool) -> None:
    Checkpoint(legacy).write(tmp_path / "a.pth")
    assert bounded(lambda: load_mar(tmp_path / "a.pth", TINY)) == ("read", "")


@pytest.mark.parametrize(
    "name",
    [
        "calls-os.system-zip", "calls-builtins.eval-old", "key-of-2-to-the-100-parts", "500000-keys", "number-nan",
        "key-with-escapes", "code-with-escapes-in-its-name", "tensor-larger-than-its-storage-zip",
        "archive-deflated", "archive-of-60000-members", "safetensors-name-twice", "safetensors-escapes",
    ],
)  # fmt: skip
def test_build_says_one_line(name: str, tmp_path: Path, export_cli: Callable[..., Result]) -> None:
    CASES[name][0](tmp_path / "a.pth")
    out = tmp_path / "bundle"
    result = export_cli("build", "--model", "mar-digits", "--checkpoint", tmp_path / "a.pth", "--out", out)
    one_line_error(result, 1, str(tmp_path / "a.pth"))
    lines = result.stderr.splitlines()
    assert [line.startswith("gtr-export: ") for line in lines].count(True) == 1
    assert all(line.isprintable() for line in lines)
    assert len(lines[-1].removeprefix("gtr-export: ")) <= 300
    assert "Traceback" not in result.output
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize("name", ["archive-deflated", "calls-os.system-zip", "safetensors-escapes"])
def test_inspect_says_one_line(name: str, tmp_path: Path, export_cli: Callable[..., Result]) -> None:
    CASES[name][0](tmp_path / "a.pth")
    result = export_cli("inspect", tmp_path / "a.pth")
    one_line_error(result, 1, str(tmp_path / "a.pth"))
    assert len(result.stderr.splitlines()) == 1
    assert len(result.stderr) <= 320


def test_a_long_path_leaves_room_for_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 200) / ("y" * 200)
    folder.mkdir(parents=True)
    Checkpoint().write(folder / "\x1b[31m\n.pth")
    (folder / "\x1b[31m\n.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(GtrError, match="is cut short: 4 bytes and no end of the archive; download it again") as caught:
        load_mar(folder / "\x1b[31m\n.pth", TINY)
    assert len(str(caught.value)) <= 300
    assert r"\x1b[31m\n.pth is cut short" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("weight", "weight"),
        ("a\x1b[31m\n\t\0b", r"a\x1b[31m\n\t\x00b"),
        ("\u202egpj.exe\u2028\udc80", r"\u202egpj.exe\u2028\udc80"),
        ("\N{SNOWMAN} é", "\N{SNOWMAN} é"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["x" * 10**6, "\n" * 1000, "\U000e0001" * 30, "a" * 21])
def test_printable_is_short(text: str) -> None:
    assert len(printable(text, 20)) == 20
    assert "…" in printable(text, 20)
    assert sys.getsizeof(printable(text, 20)) < 1000


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_training_run_writes_is_read(tmp_path: Path, zipped: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4))
    optimiser = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimiser.step()
    views = {"transposed": weight.data.t(), "part": weight.data[2:, 1:3], "row": weight.data[0], "none": torch.empty(0)}
    rest = {"size": weight.shape, "device": torch.device("cpu"), "dtype": torch.half, 7: None}
    arguments = Namespace(betas=(0.9, 0.95), names=["a", "b"], large=2**70)
    module = torch.nn.Linear(2, 3).state_dict()  # an OrderedDict with an attribute
    whole = {
        "module": module,
        "model": {"w": weight, "again": weight, **views},
        "optimizer": optimiser.state_dict(),
        "args": arguments,
    }
    torch.save({**whole, **rest}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    content = read_checkpoint(tmp_path / "a.pth")
    assert {key: content[key] for key in rest} == rest
    assert content["args"] == arguments
    assert torch.equal(content["model"]["again"], weight)
    assert all(torch.equal(content["model"][key], value) for key, value in views.items())
    assert torch.equal(content["optimizer"]["state"][0]["exp_avg"], optimiser.state_dict()["state"][0]["exp_avg"])
