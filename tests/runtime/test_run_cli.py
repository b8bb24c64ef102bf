"""gtr-run as a person types it: results, files, JSON, and one line for everything that is wrong."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.bench import _verdicts
from gtr_deploy.runtime.commands.doctor import can_run, diagnose
from gtr_deploy.runtime.commands.timing import PARTS, Measurement
from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.machine.examine import examine_machine
from gtr_deploy.runtime.pictures.png import read_settings
from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.sampling.plan import PlanSettings

Cli = Callable[..., Result]


def _one_line_error(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


class TestGenerate:
    def test_everything_at_once(self, run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
        out, grid, trace, latents = (tmp_path / name for name in ("out", "g.png", "t.gif", "l.npz"))
        options = ["--grid", grid, "--trace", trace, "--save-latents", latents, "--threads", 1]
        arguments = ["--classes", "3,seven", "--images-per-class", 2, "--plan", "gtr-fast", "--seed", 5, "--out", out]
        result = run_cli("generate", digits_bundle, *arguments, *options)
        assert result.exit_code == 0, result.output
        assert "4 images in" in result.stdout
        files = sorted(out.iterdir())
        assert [file.name for file in files] == [
            "class3-gtr-fast-seed000005.png",
            "class3-gtr-fast-seed000006.png",
            "class7-gtr-fast-seed000007.png",
            "class7-gtr-fast-seed000008.png",
            "run.json",
        ]
        with np.load(latents) as saved:
            assert saved["latents"].shape == (4, 64, 16)
            assert saved["labels"].tolist() == [3, 3, 7, 7]
            assert saved["seeds"].tolist() == [5, 6, 7, 8]
        with Image.open(trace) as animation:
            assert animation.n_frames > 10
        with Image.open(grid) as sheet:
            assert sheet.width > 2 * 96

    def test_a_picture_can_be_made_again(
        self, run_cli: Cli, digits_bundle: Path, tmp_path: Path, digits_pipeline: Pipeline
    ) -> None:
        options = ["--plan", "gtr-fast", "--cfg", 2, "--seed", 9, "--out", tmp_path, "--threads", 1]
        result = run_cli("generate", digits_bundle, "--classes", "0-2", *options, "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert [image["class"] for image in report["images"]] == [0, 1, 2]
        assert result.stderr == ""
        file = Path(report["images"][1]["file"])
        settings = read_settings(file)
        assert settings["model"] == "mar-digits"
        assert settings["plan"]["cfg"] == 2
        again = digits_pipeline.generate(
            [settings["class"]], [settings["seed"]], PlanSettings.from_json(settings["plan"])
        )
        with Image.open(file) as picture:
            difference = np.abs(np.asarray(picture.convert("RGB"), dtype=int) - again.images[0])
        assert difference.max() <= 1

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--classes", "10"], ["class 10 is not in 0..9"]),
            (["--classes", ""], ["class"]),
            (["--classes", "thre"], ["did you mean", "three"]),
            (["--classes", "3", "--plan", "best"], ["plan 'best' is not one of", "gtr-fast"]),
            (["--classes", "3", "--images-per-class", "0"], ["--images-per-class"]),
            (["--classes", "3", "--seed", "-1"], ["--seed"]),
            (["--classes", "3", "--batch-size", "0"], ["--batch-size"]),
            (["--classes", "3", "--threads", "0"], ["--threads"]),
            (["--classes", "3", "--grid", "g.jpg"], ["--grid g.jpg does not end in .png"]),
            (["--classes", "3", "--trace", "t.png"], ["--trace t.png does not end in .gif"]),
            (["--classes", "3", "--save-latents", "l"], ["--save-latents l does not end in .npz"]),
            (["--classes", "3", "--stage-steps", "a"], ["'a' is not a list of whole numbers"]),
            (["--classes", "3", "--stage-steps", "17,1,1"], ["stage 1 has 16 tokens"]),
            (["--classes", "3", "--stage-steps", "0,1,1"], ["stage 1 has 16 tokens"]),
            (["--classes", "3", "--stages", "9"], ["--stages"]),
            (["--classes", "3", "--stages", "6"], ["stage", "no token"]),
            (["--classes", "3", "--stages", "2", "--stage-steps", "1,1,1"], ["contradicts"]),
            (["--classes", "3", "--order", "spiral"], ["--order"]),
            (["--classes", "3", "--parity", "both"], ["--parity"]),
            (["--classes", "3", "--token-schedule", "x"], ["--token-schedule"]),
            (["--classes", "3", "--generation-diffusion", "50,20,10"], ["3 numbers, 2 are wanted"]),
            (["--classes", "3", "--generation-diffusion", "0"], ["0 diffusion steps"]),
            (["--classes", "3", "--reconstruction-diffusion", "2000"], ["2000 diffusion steps"]),
            (["--classes", "3", "--max-timestep", "1000"], ["max timestep 1000 is not in 0..999"]),
            (["--classes", "3", "--max-timestep", "10"], ["diffusion steps cannot be kept"]),
            (["--classes", "3", "--fts", "best"], ["--fts"]),
            (["--classes", "3", "--fts-fraction", "1.5"], ["FTS fraction 1.5 is not in 0..1"]),
            (["--classes", "3", "--fts-diffusion", "0"], ["FTS diffusion steps"]),
            (["--classes", "3", "--cfg", "-1"], ["cfg -1.0 is not in 0..100"]),
            (["--classes", "3", "--cfg", "nan"], ["cfg nan is not in"]),
            (["--classes", "3", "--cfg-schedule", "x"], ["--cfg-schedule"]),
            (["--classes", "3", "--temperature", "-0.1"], ["temperature -0.1 is not in 0..10"]),
            (["--classes", "3", "--decoder", "half"], ["--decoder"]),
            ([], ["--classes"]),
            (["--classes", "3", "--nonsense"], ["--nonsense"]),
        ],
    )
    def test_bad_arguments_are_one_line_and_write_nothing(
        self, run_cli: Cli, digits_bundle: Path, tmp_path: Path, options: list[str], words: list[str]
    ) -> None:
        out = tmp_path / "out"
        _one_line_error(run_cli("generate", digits_bundle, "--out", out, *options), 2, *words)
        assert not out.exists()

    def test_bad_bundles(self, run_cli: Cli, own_bundle: Path, tmp_path: Path) -> None:
        arguments = ["--classes", "3", "--out", tmp_path / "out"]
        _one_line_error(run_cli("generate", tmp_path / "no", *arguments), 1, "is not a folder", "gtr-export build")
        (own_bundle / "graphs" / "decoder.onnx").write_bytes(b"")
        result = run_cli("generate", own_bundle, *arguments)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith("gtr-run: ")
        assert "has 0 bytes" in result.stderr

    def test_out_that_is_a_file(self, run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("x")
        _one_line_error(run_cli("generate", digits_bundle, "--classes", "3", "--out", tmp_path / "out"), 2, "--out")


class TestPlan:
    def test_table_and_totals(self, run_cli: Cli, digits_bundle: Path) -> None:
        result = run_cli("plan", digits_bundle, "--plan", "gtr-fast")
        assert result.exit_code == 0
        assert "16 AR steps" in result.stdout
        assert "32 (3 tokens: 50)" not in result.stdout
        assert "20 (3 tokens: 50)" in result.stdout

    def test_json_adds_up(self, run_cli: Cli) -> None:
        result = run_cli("plan", "mar-h", "--json")
        report = json.loads(result.stdout)
        assert report["ratio_to_mar"] == pytest.approx(2.44, abs=0.05)
        assert sum(step["flops"] for step in report["steps"]) == report["flops"]
        assert sum(step["share"] for step in report["steps"]) == pytest.approx(1)
        assert sum(step["predicted"] for step in report["steps"]) == 256
        assert report["steps"][0]["context"] == 254

    def test_needs_no_graph_files(self, run_cli: Cli, own_bundle: Path) -> None:
        for file in (own_bundle / "graphs").iterdir():
            file.unlink()
        assert run_cli("plan", own_bundle).exit_code == 0

    def test_overrides_show(self, run_cli: Cli) -> None:
        options = ["--stages", "2", "--fts", "none", "--decoder", "compact", "--generation-diffusion", "30"]
        result = run_cli("plan", "mar-b", *options, "--json")
        plan = json.loads(result.stdout)["plan"]
        assert plan["stage_steps"] == [30, 2]
        assert plan["fts"] == "none"
        assert plan["context"] == "compact"
        assert plan["generation_diffusion"] == [30, 30]

    def test_guidance_interval_shows(self, run_cli: Cli, digits_bundle: Path) -> None:
        options = ["mar-h", "--guidance-interval", "0.25,0.75"]
        found = json.loads(run_cli("plan", *options, "--json").stdout)
        assert found["plan"]["guidance_interval"] == [0.25, 0.75]
        assert [step["branches"] for step in found["steps"]] == [1] * 24 + [2] * 7 + [1]
        assert found["flops"] < json.loads(run_cli("plan", "mar-h", "--json").stdout)["flops"]
        assert run_cli("plan", *options).stdout.count("none") == 25
        _one_line_error(run_cli("plan", "mar-h", "--guidance-interval", "0.8,0.2"), 2, "interval 0.8..0.2 is empty")
        _one_line_error(run_cli("plan", "mar-h", "--guidance-interval", "a,1"), 2, "not a list of numbers such as")

    @pytest.mark.parametrize(
        ("stages", "steps"), [(1, [32]), (2, [30, 2]), (3, [24, 6, 2]), (4, [23, 6, 1, 2]), (5, [16, 6, 1, 1, 2])]
    )
    def test_stages_keep_the_papers_proportions(self, run_cli: Cli, stages: int, steps: list[int]) -> None:
        result = run_cli("plan", "mar-h", "--stages", stages, "--json")
        assert json.loads(result.stdout)["plan"]["stage_steps"] == steps

    def test_unknown(self, run_cli: Cli) -> None:
        _one_line_error(run_cli("plan", "mar-x"), 1, "mar-x is not a folder")


class TestBench:
    def test_table_and_json(self, run_cli: Cli, digits_bundle: Path) -> None:
        options = ["--plan", "gtr-fast,gtr", "--repeat", 2, "--threads", 1, "--stage-steps", "3,2,1"]
        result = run_cli("bench", digits_bundle, *options, "--batch-size", "1,2", "--json")
        assert result.exit_code == 0, result.output
        measurements = json.loads(result.stdout)["measurements"]
        assert [(m["plan"], m["batch_size"]) for m in measurements] == [
            ("gtr-fast", 1),
            ("gtr-fast", 2),
            ("gtr", 1),
            ("gtr", 2),
        ]
        for m in measurements:
            assert len(m["seconds"]) == 2
            assert m["p5"] <= m["median"] <= m["p95"]
            assert sum(m["shares"].values()) == pytest.approx(1)
            assert min(m["shares"].values()) > 0
            assert m["peak_memory"] > 10e6
            assert m["images_per_second"] == pytest.approx(m["batch_size"] / m["median"])
        table = run_cli("bench", digits_bundle, "--plan", "gtr-fast", "--repeat", 1)
        assert "images/s" in table.stdout
        assert "backbone" in table.stdout

    def test_all_backends(self, run_cli: Cli, digits_bundle: Path) -> None:
        options = ["--plan", "gtr-fast", "--stage-steps", "2,1,1", "--repeat", 1, "--threads", 1, "--all-backends"]
        able = can_run(diagnose(examine_machine(), Bundle.load(digits_bundle)))
        report = json.loads(run_cli("bench", digits_bundle, *options, "--batch-size", "1,2", "--json").stdout)
        measured = [(m["backend"], m["batch_size"]) for m in report["measurements"]]
        assert measured == [(name, size) for name in able if name != "torch" for size in (1, 2)]
        assert {"onnxruntime cpu", "openvino"} <= {name for name, _ in measured}
        assert report["backend"] in able
        assert report["backend_why"]
        assert report["failed"] == {}
        assert [line.partition(":")[0] for line in report["verdicts"]] == ["gtr-fast, batch 1", "gtr-fast, batch 2"]
        table = run_cli("bench", digits_bundle, *options)
        assert f"without --backend: {report['backend']}" in table.stderr
        assert "gtr-fast, batch 1: " in table.stdout.splitlines()[-1]
        assert "peak MiB" not in table.stdout  # it would be that of all backends before, too

    def test_one_backend_in_memory_at_a_time(
        self, run_cli: Cli, digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two of them hold a large model's weights twice."""
        seen: list[weakref.ref[object]] = []
        alive: list[int] = []

        def measured(pipeline: Pipeline, *_: object) -> Measurement:
            gc.collect()
            alive.append(sum(backend() is not None for backend in seen))
            seen.append(weakref.ref(pipeline.backend))
            return Measurement("gtr", 1, (1.0,), dict.fromkeys(PARTS, 0.25), 0, 0)

        monkeypatch.setattr("gtr_deploy.runtime.commands.timing.measure", measured)
        assert run_cli("bench", digits_bundle, "--all-backends", "--json").exit_code == 0
        assert alive == [0] * len(seen)
        assert len(seen) > 1

    def test_backends_that_fail_are_left_out(
        self, run_cli: Cli, digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise BackendError("no such instruction")

        monkeypatch.setattr("gtr_deploy.runtime.backends.openvino.backend.OpenVinoBackend.__init__", broken)
        options = ["--stage-steps", "2,1,1", "--repeat", 1, "--threads", 1, "--all-backends", "--json"]
        result = run_cli("bench", digits_bundle, *options)
        report = json.loads(result.stdout)
        assert report["failed"] == {"openvino": "no such instruction"}
        assert "openvino" not in {m["backend"] for m in report["measurements"]}
        monkeypatch.setattr("gtr_deploy.runtime.backends.onnxruntime.backend.OnnxRuntimeBackend.__init__", broken)
        _one_line_error(run_cli("bench", digits_bundle, *options), 1, "gtr-run doctor")

    def test_verdicts(self) -> None:
        def seconds(*values: float) -> list[Measurement]:
            return [Measurement("gtr", size, (value,), {}, 0, 0) for size, value in enumerate(values, start=1)]

        taken = "is taken without --backend"
        assert _verdicts({"onnxruntime cpu": seconds(3.0, 4.0), "openvino": seconds(2.0, 5.0)}, "onnxruntime cpu") == [
            f"gtr, batch 1: openvino is fastest, 1.50 times as fast as onnxruntime cpu, which {taken}",
            f"gtr, batch 2: onnxruntime cpu is fastest, and {taken}",
        ]
        assert _verdicts({"openvino": seconds(2.0)}, "onnxruntime cpu") == ["gtr, batch 1: openvino is fastest"]

    @pytest.mark.parametrize("choice", [("--backend", "openvino"), ("--provider", "cpu")])
    def test_all_backends_and_one(self, run_cli: Cli, digits_bundle: Path, choice: tuple[str, str]) -> None:
        _one_line_error(run_cli("bench", digits_bundle, "--all-backends", *choice), 2, "--all-backends")

    @pytest.mark.parametrize("size", ["0", "a", "1,,2", "-1"])
    def test_bad_batch_size(self, run_cli: Cli, digits_bundle: Path, size: str) -> None:
        _one_line_error(run_cli("bench", digits_bundle, "--batch-size", size), 2, "--batch-size")

    def test_bad_repeat(self, run_cli: Cli, digits_bundle: Path) -> None:
        _one_line_error(run_cli("bench", digits_bundle, "--repeat", "0"), 2, "--repeat")


def test_help_is_there_for_every_command(run_cli: Cli, export_cli: Cli) -> None:
    for cli, commands in ((run_cli, ["generate", "plan", "bench"]), (export_cli, ["build", "verify", "inspect"])):
        assert cli("--help").exit_code == 0
        for command in commands:
            assert cli(command, "--help").exit_code == 0
    assert run_cli().exit_code == (2 if hasattr(click.exceptions, "NoArgsIsHelpError") else 0)  # as click has it
    assert "0.1.0" in run_cli("--version").stdout


def test_unknown_command(run_cli: Cli) -> None:
    _one_line_error(run_cli("paint"), 2, "paint")
