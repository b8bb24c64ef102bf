"""Long generations lose nothing: killed, stopped, resumed, shared among machines; no picture is written over."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from generating import BACKEND, FEW_STEPS, SHORT, ok, one_line, pictures, tree
from PIL import Image

from gtr_deploy.runtime.commands.run_folder import difference
from gtr_deploy.runtime.pictures.png import read_settings, save_png
from gtr_deploy.runtime.pipeline import Pipeline

Cli = Callable[..., Result]
Started = Callable[..., subprocess.Popen[str]]

LONG = ("--classes", "0-9", "--images-per-class", "20", "--batch-size", "4", *SHORT)


@pytest.fixture(scope="module")
def started(digits_bundle: Path) -> Started:
    """Starts ``gtr-run generate`` in a process of its own, with the signal handling that a terminal gives it."""

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        program = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "from gtr_deploy.runtime.cli import main; main(prog_name='gtr-run')"
        )
        command = [sys.executable, "-c", program, "generate", digits_bundle, *arguments]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="module")
def whole(started: Started, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of an uninterrupted run of LONG."""
    out = tmp_path_factory.mktemp("whole") / "out"
    process = started(*LONG, "--out", out)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert len(pictures(out)) == 200
    return tree(out)


def _wait_for(process: subprocess.Popen[str], out: Path, count: int) -> None:
    for _ in range(6000):
        if len(pictures(out)) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no picture came")


def test_killed_and_resumed_is_as_if_never_killed(
    started: Started,
    whole: dict[str, str],
    tmp_path: Path,
    run_cli: Cli,
    digits_bundle: Path,
) -> None:
    out = tmp_path / "out"
    process = started(*LONG, "--out", out)
    _wait_for(process, out, 9)
    process.kill()
    process.communicate(timeout=30)
    left = tree(out)
    assert "run.json" in left
    left_whole = {name: kind for name, kind in left.items() if not name.startswith(".")}
    assert 10 <= len(left_whole) < 201
    assert left_whole.items() <= whole.items()  # whole ones only

    result = ok(run_cli("generate", digits_bundle, *LONG, "--out", out, "--resume", "--json"))
    assert tree(out) == whole
    assert json.loads(result.stdout)["kept"] == len(left_whole) - 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_batch_finish(started: Started, tmp_path: Path, number: signal.Signals, code: int) -> None:
    out = tmp_path / "out"
    process = started(*LONG, "--out", out, "--save-latents", tmp_path / "l.npz", "--grid", tmp_path / "g.png")
    _wait_for(process, out, 4)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    count = len(pictures(out))
    assert 4 <= count < 200
    assert count % 4 == 0
    assert said.splitlines()[-1] == (
        f"stopped: {count} of 200 images are in {out}; the same command with --resume goes on"
    )
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(out.glob(".*"))


def test_a_second_signal_stops_at_once(started: Started, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # One batch that takes minutes.
    process = started("--classes", "0-9", "--images-per-class", "40", "--batch-size", "400", *BACKEND, "--out", out)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "AR steps" in line:
            process.send_signal(signal.SIGINT)
        if "once more stops at once" in line:
            break
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert time.monotonic() - begin < 15
    assert process.returncode == 130
    assert "stopped: 0 of 400 images" in rest, said + rest
    assert [path.name for path in out.iterdir()] == ["run.json"]


def test_what_is_missing_or_cut_off_is_made_again_and_nothing_else(
    run_cli: Cli, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("generate", digits_bundle, "--classes", "3,7", "--images-per-class", "5", "--batch-size", "4", *SHORT)
    ok(run_cli(*arguments, "--out", out))
    before, times = tree(out), {path: path.stat().st_mtime_ns for path in pictures(out)}
    missing, cut = pictures(out)[1], pictures(out)[9]
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-5])
    batches: list[int] = []
    real = Pipeline._batch
    monkeypatch.setattr(
        Pipeline, "_batch", lambda self, asked, *rest: batches.append(len(asked)) or real(self, asked, *rest)
    )
    result = ok(run_cli(*arguments, "--out", out, "--resume"))
    assert "2 images in" in result.stdout
    assert "8 were there" in result.stdout
    assert batches == [4, 2]  # the batches that they belong to, and not the one between
    assert tree(out) == before
    changed = {path for path, when in times.items() if path.stat().st_mtime_ns != when}
    assert changed == {missing, cut}
    ok(run_cli(*arguments, "--out", out, "--resume", "--grid", tmp_path / "g.png"))
    assert batches == [4, 2]
    with Image.open(tmp_path / "g.png") as sheet:
        assert sheet.width > 2 * 96


class TestOtherRuns:
    ARGUMENTS = ("--classes", "3", "--images-per-class", "2", *BACKEND, *FEW_STEPS)

    def test_the_same_command_again(self, run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
        arguments = ("generate", digits_bundle, *self.ARGUMENTS, "--plan", "gtr", "--out", tmp_path)
        ok(run_cli(*arguments))
        before = tree(tmp_path)
        one_line(run_cli(*arguments), 1, "2 of 2 pictures of this run", "--resume", "--out")
        pictures(tmp_path)[0].unlink()
        one_line(run_cli(*arguments), 1, "1 of 2 pictures of this run")
        ok(run_cli(*arguments, "--resume"))
        assert tree(tmp_path) == before

    def test_another_plan_has_other_names(self, run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
        arguments = ("generate", digits_bundle, "--classes", "3", *BACKEND, "--out", tmp_path)
        names = []
        for options in (["--plan", "gtr-fast"], ["--plan", "gtr-fast", "--cfg", "2.5"], [*FEW_STEPS, "--cfg", "1"]):
            before = tree(tmp_path)
            ok(run_cli(*arguments, *options))
            names += [path.name for path in pictures(tmp_path) if path.name not in before]
            assert before.items() <= tree(tmp_path).items()
        assert names[:2] == ["class3-gtr-fast-seed000000.png", "class3-gtr-fast-cfg2.5-seed000000.png"]
        assert re.fullmatch(r"class3-gtr-[0-9a-f]{8}-seed000000\.png", names[2])
        assert sorted(path.name for path in tmp_path.glob("*.json")) == ["run-2.json", "run-3.json", "run.json"]

    def test_resume_refuses_a_folder_of_another_run(self, run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
        arguments = ("generate", digits_bundle, *BACKEND, *FEW_STEPS, "--plan", "gtr", "--out", tmp_path)
        ok(run_cli(*arguments, "--classes", "3", "--cfg", "3.5", "--resume"))
        before = tree(tmp_path)
        for options, found in (
            (["--classes", "3", "--cfg", "2.5"], "plan.cfg is 3.5 there and 2.5 here"),
            (["--classes", "4", "--cfg", "3.5"], "requests.0.class is 3 there and 4 here"),
            (["--classes", "3,4", "--cfg", "3.5"], 'requests is [{"class": 3, "class_name": "3"}] there and'),
            (["--classes", "3", "--cfg", "3.5", "--seed", "5"], "seeds.first is 0 there and 5 here"),
            (["--classes", "3", "--cfg", "3.5", "--layout", "class"], "layout is flat there and class here"),
        ):
            one_line(run_cli(*arguments, *options, "--resume"), 1, "run.json is another run: ", found, "--out")
        assert tree(tmp_path) == before
        ok(run_cli(*arguments, "--classes", "4", "--cfg", "3.5"))
        ok(run_cli(*arguments, "--classes", "4", "--cfg", "3.5", "--resume"))
        ok(run_cli(*arguments, "--classes", "3", "--cfg", "3.5", "--resume"))

    @pytest.mark.parametrize("resume", [[], ["--resume"]])
    def test_a_picture_of_another_bundle(
        self, run_cli: Cli, digits_bundle: Path, tmp_path: Path, resume: list[str]
    ) -> None:
        arguments = ("generate", digits_bundle, *self.ARGUMENTS, "--plan", "gtr", "--out", tmp_path)
        ok(run_cli(*arguments))
        (tmp_path / "run.json").unlink()
        file = pictures(tmp_path)[1]
        settings = read_settings(file)
        pictures(tmp_path)[0].unlink()
        save_png(file, np.zeros((32, 32, 3), np.uint8), {**settings, "bundle": "0" * 64})
        before = tree(tmp_path)
        line = f"bundle is {'0' * 12}… there and {settings['bundle'][:12]}… here"
        one_line(run_cli(*arguments, *resume), 1, file.name, "picture of another run", line, "--out")
        assert tree(tmp_path) == before
        Image.new("RGB", (32, 32)).save(file)
        one_line(run_cli(*arguments, *resume), 1, file.name, "holds no settings")
        assert not (tmp_path / "run.json").exists()

    def test_a_damaged_record(self, run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
        for text in ("", "{", "[]", '{"plan": 3}'):
            (tmp_path / "run.json").write_text(text)
            result = run_cli("generate", digits_bundle, *self.ARGUMENTS, "--out", tmp_path, "--resume")
            one_line(result, 1, "run.json")


@pytest.mark.parametrize("layout", ["flat", "class"])
def test_shards_are_the_whole(run_cli: Cli, digits_bundle: Path, tmp_path: Path, layout: str) -> None:
    options = ("--classes", "3,7", "--images-per-class", "5", "--batch-size", "2", "--layout", layout, *SHORT)
    ok(run_cli("generate", digits_bundle, *options, "--out", tmp_path / "one"))
    wanted = {name: kind for name, kind in tree(tmp_path / "one").items() if name != "run.json"}
    assert len(wanted) == 10
    found: dict[str, str] = {}
    for part in (2, 1, 3):
        out = tmp_path / f"part{part}"
        ok(run_cli("generate", digits_bundle, *options, "--shard", f"{part}/3", "--out", out))
        ok(run_cli("generate", digits_bundle, *options, "--shard", f"{part}/3", "--out", tmp_path / "all", "--resume"))
        own = {name: kind for name, kind in tree(out).items() if name != "run.json"}
        assert len(own) in (3, 4)
        assert not own.keys() & found.keys()
        found |= own
        assert json.loads((out / "run.json").read_text())["shard"] == f"{part}/3"
    assert found == wanted
    together = tree(tmp_path / "all")
    assert {name: kind for name, kind in together.items() if name.endswith(".png")} == wanted
    # The machine that has all of them finds nothing to do.
    assert "0 images" in ok(run_cli("generate", digits_bundle, *options, "--out", tmp_path / "all", "--resume")).stdout
    if layout == "class":
        assert {name.split("/")[0] for name in wanted} == {"class3", "class7"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "3/2"], "--shard 3/2"),
        (["--shard", "0/2"], "--shard 0/2"),
        (["--shard", "0/0"], "--shard 0/0"),
        (["--shard", "3/5"], "of 2 pictures"),
        (["--shard", "1"], "'1' is not a part such as 1/4"),
        (["--shard", "1/-2"], "--shard"),
        (["--layout", "tree"], "--layout"),
        (["--grid", "g.png", "--images-per-class", "401"], "--grid shows at most 400 images, this run makes 802"),
        (["--like", "none.png"], "none.png"),
    ],
)
def test_wrong_options_write_nothing(
    run_cli: Cli, digits_bundle: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    out = tmp_path / "out"
    one_line(run_cli("generate", digits_bundle, "--classes", "3,7", "--out", out, *options, *SHORT), 2, words)
    assert not out.exists()


def test_latents_are_those_of_the_pipeline_also_when_resumed(
    run_cli: Cli, digits_bundle: Path, digits_pipeline: Pipeline, tmp_path: Path
) -> None:
    out, file = tmp_path / "out", tmp_path / "l.npz"
    arguments = ("generate", digits_bundle, "--classes", "3-5", "--batch-size", "2", "--plan", "gtr-fast", *BACKEND)
    ok(run_cli(*arguments, "--out", out, "--save-latents", file))
    wanted = digits_pipeline.generate([3, 4, 5], plan="gtr-fast", batch_size=2).latents
    first = file.read_bytes()
    with np.load(file) as saved:
        assert np.array_equal(saved["latents"], wanted)
        assert saved["latents"].dtype == np.float32
        assert saved["seeds"].tolist() == [0, 1, 2]
        assert saved["labels"].tolist() == [3, 4, 5]
    before = tree(out)
    pictures(out)[0].unlink()
    file.unlink()
    result = ok(run_cli(*arguments, "--out", out, "--save-latents", file, "--resume", "--trace", tmp_path / "t.gif"))
    assert "made once more" in result.stderr
    assert file.read_bytes() == first
    assert tree(out) == before


def test_a_full_disk(run_cli: Cli, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ("generate", digits_bundle, "--classes", "3", "--images-per-class", "5", "--batch-size", "2", *SHORT)
    written: list[Path] = []
    real = Path.write_bytes

    def full(self: Path, content: Any) -> int:
        if len(written) == 3:
            real(self, bytes(content)[:10])
            raise OSError(28, "No space left on device")
        written.append(self)
        return real(self, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        result = run_cli(*arguments, "--out", out)
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert re.search(
        r"class3-gtr-fast-.*-seed000003\.png: No space left on device: the file needs [\d,]+ bytes, [\d,]+ are", line
    )
    assert line.endswith("3 of 5 images are there, the same command with --resume goes on")
    assert len(tree(out)) == 4
    assert "2 images" in ok(run_cli(*arguments, "--out", out, "--resume")).stdout


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, None),
        ({"a": 1}, {"a": 2}, "a is 1 there and 2 here"),
        ({}, {"a": 2}, "a is missing there and 2 here"),
        ({"a": {"b": [1, 2, 3]}}, {"a": {"b": [1, 5, 3]}}, "a.b.1 is 2 there and 5 here"),
        ({"a": list(range(9))}, {"a": [0]}, "a is 9 long there and 1 long here"),
        ({"a": "\x1b"}, {"a": "b"}, "a is \\x1b there and b here"),
        ({"a": {"b": 1}}, {"a": [1]}, 'a is {"b": 1} there and [1] here'),
    ],
)
def test_differences_have_both_values(there: Any, here: Any, line: str | None) -> None:
    assert difference(there, here) == line
