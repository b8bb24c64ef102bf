"""Models without classes, eMIGM's layout, and plan defaults of one's own: from a checkpoint to verified pictures."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from commands import one_line_error
from jobs import ARCHITECTURES
from msgspec import structs
from PIL import Image
from safetensors.torch import load_file

from gtr_deploy.export.build.checkpoints import expected_mar, load_mar, random_mar
from gtr_deploy.export.build.inference import Told, find
from gtr_deploy.export.build.layouts import EMIGM, guidance_interval
from gtr_deploy.export.zoo import MODELS
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import GtrError, PlanError, UsageError
from gtr_deploy.runtime.models.architecture import Decoder
from gtr_deploy.runtime.models.mar import KL16, MarArchitecture, UnconditionalArchitecture
from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.sampling.job import generation_job
from gtr_deploy.runtime.sampling.noise import SeededNoise

Cli = Callable[..., Result]
SIZES: dict[str, Any] = {
    "name": "mine", "grid": (6, 4), "buffer": 3, "token_channels": 16, "width": 32, "depth": 2, "heads": 2,
    "head_depth": 1, "head_width": 32, "decoder": Decoder(kind="patches", stride=1, patch=4),
}  # fmt: skip
FREE, CLASSED = UnconditionalArchitecture(**SIZES), MarArchitecture(**SIZES, classes=5)
SAID = ["--heads", 2, "--patch-size", 4, "--grid", "6x4"]


def save(path: Path, state: dict[str, torch.Tensor], **args: Any) -> Path:
    torch.save({"model": state, "args": Namespace(**args)}, path)
    return path


class TestUnconditional:
    def test_from_checkpoint_to_verified_pictures(
        self, export_cli: Cli, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        save(tmp_path / "mine.pth", random_mar(FREE, 1))
        done = export_cli("build", "--checkpoint", "mine.pth", *SAID, "--max-timestep", 950, "--out", "b")
        assert done.exit_code == 0, done.output
        assert "model: unconditional (no class_emb.weight): nothing is asked of it" in done.stderr
        bundle = Bundle.load(tmp_path / "b")
        assert bundle.architecture == FREE
        done = export_cli("verify", "b", "--plans", "gtr-fast", "--images", "1", "--json")
        assert json.loads(done.stdout)["rung_reached"] == "images", done.output
        assert "unconditional" in export_cli("inspect", "b").stdout

        short = ["--plan", "gtr-fast:stage-steps=2+1+1"]
        options = ["--images", 3, *short, "--grid", "sheet.png", "--save-latents", "latents.npz"]
        done = run_cli("generate", "b", "--out", "pictures", *options)
        assert done.exit_code == 0, done.output
        names = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
        assert [name[:13] for name in names] == ["unconditional"] * 3
        first = tmp_path / "pictures" / names[1]
        assert run_cli("generate", "b", "--like", first, "--out", "again").exit_code == 0
        (again,) = (tmp_path / "again").glob("*.png")
        assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
        for command in (
            ["bench", "b", "--repeat", 1, "--plans", "gtr-fast:stage-steps=2+1+1"],
            ["compare", "b", "--plans", "gtr-fast:stage-steps=2+1+1,gtr-fast", "--images", 2, "--grid", "c.png"],
        ):
            done = run_cli(*command)
            assert done.exit_code == 0, done.output
        calibrated = ["--calibration-images", 2, "--compared-images", 2, "--calibration-plan", "gtr-fast", "--keep", 0]
        done = export_cli("calibrate", "b", *calibrated, "--out", "b8")
        assert done.exit_code == 0, done.output
        assert Bundle.load(tmp_path / "b8").architecture == FREE
        for option, said in (("--classes", "no such request"), ("--cfg", "nothing that it could be guided to")):
            done = run_cli("generate", "b", option, "3", "--out", "x")
            assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
            assert said in done.stderr

    def test_it_is_what_the_null_embedding_makes(
        self, export_cli: Cli, digits_pipeline: Pipeline, tmp_path: Path
    ) -> None:
        """mar-digits without its classes, against mar-digits asked for the null label."""
        shipped = MODELS["mar-digits"].shipped
        assert shipped is not None
        args = {"model": "mar_digits", "vae_stride": 4, "patch_size": 1, "vae_embed_dim": 16, "class_num": 10}
        plan = digits_pipeline.plan("gtr-fast", cfg=1.0)
        seeds, noise = [3, 4], SeededNoise([3, 4], 16)
        nothing = {"labels": np.full((2, 2), 10)}
        job = generation_job(plan, digits_pipeline.architecture, nothing, seeds, noise)
        wanted = digits_pipeline.backend.generate(job)
        for number, (more, options) in enumerate([({}, ["--unconditional"]), ({"label_drop_prob": 1.0}, [])]):
            file = save(tmp_path / f"free{number}.pth", load_file(shipped), **args, **more)
            done = export_cli("build", "--checkpoint", file, *options, "--out", tmp_path / f"b{number}")
            assert done.exit_code == 0, done.output
            assert "unconditional (" + ("args.label_drop_prob is 1" if more else "--unconditional") in done.stderr
            pipeline = Pipeline.load(tmp_path / f"b{number}", "onnxruntime", threads=1)
            found = pipeline.generate([None, None], seeds, plan.settings)
            assert np.abs(found.latents - wanted).max() < 1e-5 * np.abs(wanted).max()
            with pytest.raises(UsageError, match="takes no request"):
                pipeline.generate([3])
            with pytest.raises(PlanError, match="nothing that it could be guided to"):
                pipeline.plan("gtr", cfg=3)

    def test_what_does_not_fit(self, export_cli: Cli, tmp_path: Path) -> None:
        file = save(tmp_path / "mine.pth", {**random_mar(FREE, 1), "class_emb.weight": torch.zeros(0, 32)})
        assert "class_emb.weight has no row" in export_cli("inspect", file).stdout
        names = tmp_path / "names.txt"
        names.write_text("one\n")
        build = ["build", "--checkpoint", file, *SAID, "--out", tmp_path / "b"]
        one_line_error(export_cli(*build, "--class-names", names), 2, "mine is not asked for by class")
        one_line_error(export_cli(*build, "--cfg", 3), 2, "nothing that it could be guided to")
        one_line_error(export_cli("build", "--model", "mar-b", "--unconditional"), 2, "without a name here")


class TestEmigm:
    def tied(self, shape: tuple[int, ...] = (1, 32)) -> dict[str, torch.Tensor]:
        """As eMIGM's state dict: one parameter under two names."""
        state = random_mar(CLASSED, 1)
        return {**state, "mask_token": state["fake_latent"].reshape(shape)}

    @pytest.mark.parametrize("kept", [True, False], ids=["both names", "one name"])
    def test_from_checkpoint_to_verified_pictures(self, export_cli: Cli, tmp_path: Path, kept: bool) -> None:
        state = self.tied()
        if not kept:
            del state["mask_token"]
        file = save(tmp_path / "mine.pth", state)
        done = export_cli("build", "--checkpoint", file, *SAID, "--max-timestep", 950, "--out", tmp_path / "b")
        assert done.exit_code == 0, done.output
        assert "model: eMIGM's layout: its null embedding is its mask token" in done.stderr
        done = export_cli("verify", tmp_path / "b", "--plans", "gtr-fast", "--images", "1", "--json")
        assert json.loads(done.stdout)["rung_reached"] == "images", done.output
        # The very pictures of the same weights in MAR's own layout.
        own = save(tmp_path / "own.pth", self.tied((1, 1, 32)))
        done = export_cli("build", "--checkpoint", own, *SAID, "--max-timestep", 950, "--out", tmp_path / "o")
        assert "eMIGM" not in done.stderr
        made = [Pipeline.load(tmp_path / name, "onnxruntime", threads=1) for name in "bo"]
        first, second = (pipeline.generate([2], plan="gtr-fast:cfg=2") for pipeline in made)
        assert np.array_equal(first.latents, second.latents)

    def test_the_later_name_counts(self, tmp_path: Path) -> None:
        """Beside EMA weights the mask token is not averaged, and the original's loading takes it for both."""
        state = self.tied()
        state["mask_token"] = state["mask_token"] + 1
        weights = load_mar(save(tmp_path / "mine.pth", state), CLASSED).weights
        assert torch.equal(weights["fake_latent"], state["mask_token"])
        assert torch.equal(weights["mask_token"], state["mask_token"][None])

    @pytest.mark.parametrize("sizes", EMIGM, ids=lambda sizes: EMIGM[sizes].name)
    def test_published_sizes(self, sizes: tuple[Any, ...]) -> None:
        (channels, stride), width, depth, head_depth, head_width = sizes
        model = MarArchitecture(
            name="any", grid=(16, 16), token_channels=channels, classes=1000, buffer=64, width=width, depth=depth,
            heads=1, head_depth=head_depth, head_width=head_width, decoder=structs.replace(KL16, stride=stride),
        )  # fmt: skip
        state = {key: torch.empty(shape, device="meta") for key, shape in expected_mar(model).items()}
        found = find({**state, "mask_token": state["fake_latent"]}, None, Told())
        published = EMIGM[sizes]
        assert (found.values["heads"], found.values["grid"], found.values["stride"]) == (
            published.heads, (16, 16), stride,
        )  # fmt: skip
        if published.times is None:
            assert "DC-AE" in " ".join(found.notes)
            with pytest.raises(GtrError, match="decoder"):
                found.architecture("any")
        else:
            assert found.architecture("any").decoder == KL16
            assert found.plan_defaults["guidance_interval"] == guidance_interval(published.times)
        assert find(state, None, Told()).plan_defaults == {}  # a MAR of these sizes

    def test_guidance_interval(self) -> None:
        """Guided while t_min < t <= t_max; time falls from 1 to 0 while tokens become known."""
        assert guidance_interval((0.0, 1.0)) == (0.0, 1.0)
        assert guidance_interval((0.1, 0.3)) == (0.218, 0.604)

    def test_it_is_not_taken_for_mar(self, export_cli: Cli, tmp_path: Path) -> None:
        architecture = ARCHITECTURES["mar-digits"]
        state = random_mar(architecture, 1)
        file = save(tmp_path / "mine.pth", {**state, "mask_token": state["fake_latent"]})
        with pytest.raises(GtrError, match="eMIGM's layout; build it without --model"):
            load_mar(file, architecture)


class TestPlanDefaults:
    def test_they_are_kept_and_shown(self, export_cli: Cli, run_cli: Cli, tmp_path: Path) -> None:
        file, out = save(tmp_path / "mine.pth", random_mar(CLASSED, 1)), tmp_path / "b"
        build = ["build", "--checkpoint", file, *SAID, "--out", out, "--json"]
        options = ["--cfg", 2.5, "--max-timestep", 950, "--temperature", 0.9, "--guidance-interval", "0.25,1"]
        done = export_cli(*build, *options)
        assert done.exit_code == 0, done.output
        defaults = Bundle.load(out).plan_defaults
        assert defaults == {
            "cfg": 2.5, "cfg_schedule": "linear", "max_timestep": 950, "temperature": 0.9,
            "guidance_interval": (0.25, 1.0),
        }  # fmt: skip
        shown = export_cli("inspect", out).stdout
        assert "cfg 2.5" in shown
        assert "guidance_interval 0.25,1" in shown
        plan = json.loads(run_cli("plan", out, "--plan", "gtr-fast", "--json").stdout)
        assert (plan["plan"]["cfg"], plan["plan"]["guidance_interval"]) == (2.5, [0.25, 1.0])
        assert [step["branches"] for step in plan["steps"]] == [1] * 6 + [2] * 4
        assert Pipeline.load(out, "onnxruntime").plan("gtr", guidance_interval=(0, 1)).steps[0].branches == 2
        stages = json.loads(export_cli(*build, "--cfg", 3).stdout)["stages"]  # the manifest alone is written anew
        assert {stages.pop("manifest"), *stages.values()} == {"built", "cached"}
        assert Bundle.load(out).plan_defaults["cfg"] == 3
        one_line_error(export_cli(*build, "--max-timestep", 1000), 2, "max timestep 1000 is not in 0..999")
        one_line_error(export_cli(*build, "--guidance-interval", "0.5,0.2"), 2, "interval 0.5..0.2 is empty")

    def test_of_a_known_model(self, export_cli: Cli, tmp_path: Path) -> None:
        done = export_cli("build", "--model", "mar-digits", "--random-weights", "--cfg", 1.5, "--out", tmp_path / "b")
        assert done.exit_code == 0, done.output
        assert Bundle.load(tmp_path / "b").plan_defaults == {
            "cfg": 1.5, "cfg_schedule": "linear", "max_timestep": 950, "temperature": 0.9,
        }  # fmt: skip
