"""Models that have no name here, from a checkpoint to pictures that were verified, as a person types it."""

from __future__ import annotations

import json
import shutil
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
from safetensors.torch import load_file, save_file
from vae_files import write_vae

from gtr_deploy.export.build.checkpoints import random_mar
from gtr_deploy.export.build.vae import random_vae_decoder
from gtr_deploy.export.zoo import MODELS
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.models.architecture import Decoder
from gtr_deploy.runtime.models.mar import KL16, MarArchitecture
from gtr_deploy.runtime.pipeline import Pipeline

Cli = Callable[..., Result]
OFFICIAL = Path(__file__).parents[1] / "data" / "mar_tiny_checkpoint-last.pth"


def own(grid: tuple[int, int], classes: int, buffer: int, channels: int, decoder: Decoder) -> MarArchitecture:
    return MarArchitecture(
        name="mine", grid=grid, classes=classes, buffer=buffer, token_channels=channels, decoder=decoder,
        width=32, depth=1, heads=2, head_depth=1, head_width=32,
    )  # fmt: skip


def save(path: Path, architecture: MarArchitecture, **args: Any) -> Path:
    """As the original's training writes it."""
    weights = {"model": random_mar(architecture, 2), "model_ema": random_mar(architecture, 1)}
    torch.save({**weights, "epoch": 1, "args": Namespace(**args)}, path)
    return path


PIXELS = Decoder(kind="patches", stride=1, patch=4)


@pytest.mark.parametrize(
    ("architecture", "args", "options", "size"),
    [
        (own((8, 8), 1, 0, 16, PIXELS), {}, ["--heads", 2, "--patch-size", 4], (32, 32)),
        (
            own((6, 10), 37, 5, 16, PIXELS),
            {"model": "mar_mine", "img_size": [24, 40], "vae_stride": 4, "vae_embed_dim": 16, "patch_size": 1},
            ["--heads", 2],
            (24, 40),
        ),
        (
            own((32, 32), 3, 256, 4, structs.replace(PIXELS, patch=2)),
            {"img_size": 64, "vae_stride": 1, "vae_embed_dim": 1, "patch_size": 2, "class_num": 3, "buffer_size": 256},
            ["--heads", 2],
            (64, 64),
        ),
        (
            own((3, 2), 5, 64, 64, structs.replace(KL16, patch=2)),
            {"vae_stride": 16, "vae_embed_dim": 16, "patch_size": 2},
            ["--heads", 2, "--grid", "3x2", "--vae", "vae.ckpt"],
            (96, 64),
        ),
        (
            own((4, 4), 5, 4, 12, structs.replace(PIXELS, patch=2)),
            {},
            ["--heads", 2, "--decoder", "pixels"],
            (8, 8),
        ),
        (
            own((4, 3), 5, 4, 16, Decoder(kind="kl", stride=8, patch=2, scale=0.18215)),
            {},
            ["--heads", 2, "--grid", "4x3", "--vae", "f8"],
            (64, 48),
        ),
        (
            own((4, 4), 5, 4, 64, Decoder(kind="kl", stride=2, patch=2, scale=1.5305, shift=0.0609, groups=8)),
            {},
            ["--heads", 2, "--vae", "shift"],
            (16, 16),
        ),
        (
            own((4, 4), 5, 4, 3, Decoder(kind="kl", stride=4, scale=0.5)),
            {"vae_stride": 4, "vae_embed_dim": 3, "patch_size": 1, "img_size": 16},
            ["--heads", 2, "--vae", "attention/vae.ckpt", "--latent-scale", "0.5"],
            (16, 16),
        ),
    ],
    ids=[
        "one class, no buffer", "37 classes, 6x10", "32x32, buffer of 256", "latents in patches", "RGB pixels",
        "Stable Diffusion's VAE", "a shift, in patches", "latent diffusion's VAE with attention",
    ],
)  # fmt: skip
def test_from_checkpoint_to_verified_pictures(
    export_cli: Cli, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: MarArchitecture,
    args: dict[str, Any], options: list[Any], size: tuple[int, int],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "mine.pth", architecture, **args)
    for case, layout in (("f8", "folder"), ("shift", "old .bin"), ("attention", "ldm")):
        (tmp_path / case).mkdir()
        write_vae(tmp_path / case, case, layout)
    if "vae.ckpt" in options:
        torch.save({"model": random_vae_decoder(architecture, 0)}, tmp_path / "vae.ckpt")
    done = export_cli("build", "--checkpoint", "mine.pth", *options)
    assert done.exit_code == 0, done.output
    assert f"classes {architecture.classes}, width 32, depth 1, " in done.stderr
    assert "heads 2" in done.stderr
    bundle = Bundle.load(tmp_path / "bundles" / "mine-fp32")
    assert bundle.architecture == architecture
    assert bundle.plan_defaults == {"cfg": 1.0, "cfg_schedule": "linear", "max_timestep": 999, "temperature": 1.0}

    last = architecture.classes - 1
    done = run_cli("generate", bundle.folder, "--classes", f"0,{last}", "--plan", "gtr-fast", "--out", "pictures")
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert [int(name.removeprefix("class").partition("-")[0]) for name in names] == [0, last]
    assert Pipeline.load(bundle, "onnxruntime", threads=1).generate([0], plan="gtr-fast").images.shape == (1, *size, 3)
    done = export_cli("verify", bundle.folder, "--plans", "gtr-fast", "--images", "1", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rung_reached"] == "images"


def test_fewer_classes_of_a_known_model_give_its_very_pictures(
    export_cli: Cli, digits_pipeline: Pipeline, tmp_path: Path
) -> None:
    """mar-digits with the classes 0 to 4 only: wrong heads, patches or rows of the embedding would show."""
    shipped = MODELS["mar-digits"].shipped
    assert shipped is not None
    state = load_file(shipped)
    state["class_emb.weight"] = state["class_emb.weight"][:5].clone()
    args = Namespace(model="mar_digits", img_size=32, vae_stride=4, patch_size=1, vae_embed_dim=16, class_num=5)
    torch.save({"model": state, "model_ema": None, "args": args}, tmp_path / "five.pth")
    options = ["build", "--model", "auto", "--checkpoint", tmp_path / "five.pth", "--name", "five.2", "--json"]
    done = export_cli(*options, "--out", tmp_path / "b")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model"] == "five.2"
    bundle = Bundle.load(tmp_path / "b")
    assert bundle.architecture == structs.replace(ARCHITECTURES["mar-digits"], name="five.2", classes=5)
    assert bundle.conditioner.summary == "5 classes, 0 to 4"
    plan = digits_pipeline.plan("gtr-fast").settings
    ours = Pipeline.load(bundle, "onnxruntime", threads=1).generate([1, 4], seeds=[3, 4], plan=plan)
    theirs = digits_pipeline.generate([1, 4], seeds=[3, 4], plan=plan)
    assert np.array_equal(ours.images, theirs.images)
    assert len(np.unique(ours.images)) > 50
    assert set(json.loads(export_cli(*options, "--out", tmp_path / "b").stdout)["stages"].values()) == {"cached"}
    one_line_error(export_cli(*options[:-2], "mine", "--out", tmp_path / "b"), 1, "holds five.2 fp32", "mine fp32")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, ["give --model NAME, or --checkpoint FILE of a model of your own"]),
        (["--random-weights"], 2, ["give --model NAME"]),
        (["--checkpoint", "none.pth"], 2, ["none.pth does not exist"]),
        (["--checkpoint", "tiny.pth"], 2, ["tiny.pth does not say", "(--heads N), nor", "(--patch-size N)"]),
        (["--checkpoint", "tiny.pth", "--heads", 4, "--patch-size", 3], 2, ["16 channels", "3x3 (--patch-size)"]),
        (["--checkpoint", "tiny.pth", "--heads", 5, "--patch-size", 4], 1, ["width 64 is not a multiple of 5 heads"]),
        (["--checkpoint", "tiny.pth", "--heads", 4, "--grid", "4x4"], 2, ["tokens 64 (tensors), 16 (--grid 4x4)"]),
        (["--checkpoint", "tiny.pth", "--grid", "4"], 2, ["--grid", "'4' is not rows x columns"]),
        (["--checkpoint", "tiny.pth", "--name", "a b"], 2, ["'a b' is no name for a model"]),
        (["--checkpoint", "my tiny.pth"], 2, ["'my tiny' is no name", "--name"]),
        (["--checkpoint", "tiny.pth", "--random-weights"], 2, ["contradict each other"]),
        (["--model", "mar-digits", "--heads", 4], 2, ["without a name here, not for mar-digits"]),
        (["--model", "mar-digits", "--name", "x"], 2, ["without a name here, not for mar-digits"]),
        (["--checkpoint", "digits.safetensors"], 2, ["--heads", "or --model mar-digits if it is that"]),
        (
            ["--checkpoint", "tiny.pth", "--heads", 4, "--patch-size", 4, "--class-names", "none.txt"],
            2,
            ["--class-names none.txt cannot be read (No such file or directory)"],
        ),
    ],
)
def test_what_is_refused_before_any_work(
    export_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Any], code: int, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny.pth", "my tiny.pth"):
        shutil.copy(OFFICIAL, tmp_path / name)
    save_file(load_file(MODELS["mar-digits"].shipped or ""), tmp_path / "digits.safetensors")
    one_line_error(export_cli("build", *options), code, *words)
    assert not (tmp_path / "bundles").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vae", "none"], ["--vae none does not exist"]),
        (["--vae", "f8", "--decoder", "pixels"], ["--decoder pixels and --vae contradict each other"]),
        (["--vae", "f8", "--no-decoder"], ["--no-decoder and --vae contradict each other"]),
        (["--no-decoder", "--latent-scale", 1], ["--no-decoder and --latent-scale or --latent-shift contradict"]),
        (["--no-decoder", "--decoder", "pixels"], ["--no-decoder and --decoder pixels contradict each other"]),
        (["--vae", "f8", "--latent-scale", 0], ["--latent-scale 0 is not a number above 0"]),
        (["--vae", "f8", "--latent-scale", "nan"], ["--latent-scale nan is not a number above 0"]),
        (["--vae", "f8", "--latent-shift", "nan"], ["--latent-shift nan is out of range"]),
        (["--vae", "f8"], ["a.pth contradicts: 17 channels of a token (tensors), latents of 4 channels (--vae)"]),
        (["--decoder", "pixels"], ["a.pth --decoder pixels: 17 channels of a token are neither"]),
        (["--patch-size", 1], ["which decoder latents of 17 channels have (--vae FILE, --decoder pixels or --no-deco"]),
        (["--model", "mar-b", "--decoder", "pixels"], ["without a name here, not for mar-b"]),
        (["--model", "mar-b", "--latent-shift", 1], ["without a name here, not for mar-b"]),
        (["--model", "mar-b", "--vae", "f8", "--no-decoder"], ["--no-decoder and --vae contradict each other"]),
    ],
)
def test_decoders_that_cannot_be(
    export_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Any], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f8").mkdir()
    write_vae(tmp_path / "f8", "f8", "folder")
    save(tmp_path / "a.pth", own((4, 4), 2, 2, 17, structs.replace(KL16)))
    own_options = [] if "--model" in options else ["--checkpoint", "a.pth", "--heads", 2]
    one_line_error(export_cli("build", *own_options, *options, "--out", "b"), 2, *words)
    assert not (tmp_path / "b").exists()


def test_a_vae_of_another_stride_than_the_named_model_s(export_cli: Cli, tmp_path: Path) -> None:
    write_vae(tmp_path, "f8", "folder")
    result = export_cli("build", "--model", "mar-b", "--random-weights", "--vae", tmp_path, "--out", tmp_path / "b")
    one_line_error(result, 1, "has latents of 4 channels, mar-b needs 16; give another --vae")


def test_inspect_says_what_a_checkpoint_is(export_cli: Cli, tmp_path: Path) -> None:
    result = export_cli("inspect", OFFICIAL)
    assert result.exit_code == 0, result.output
    assert "model_ema" in result.stdout
    assert f"next: gtr-export build --checkpoint {OFFICIAL} --heads N --patch-size N" in result.stdout
    document = json.loads(export_cli("inspect", OFFICIAL, "--json").stdout)
    assert document["sizes"]["grid"] == [8, 8]
    assert document["from"]["grid"] == "square"
    assert list(document["missing"]) == ["heads", "patch"]
    assert (document["weights"], document["known"]) == ("model_ema", None)

    shipped = MODELS["mar-digits"].shipped
    result = export_cli("inspect", shipped or "")
    assert "these are the sizes of mar-digits" in result.stdout
    assert f"next: gtr-export build --model mar-digits --checkpoint {shipped}" in result.stdout

    path = save(tmp_path / "a b.pth", own((8, 8), 2, 2, 16, KL16), model="mar_base")
    one_line_error(export_cli("inspect", path), 1, "width 32 (tensors), 768 (args.model mar_base)")
    path = save(tmp_path / "a b.pth", own((5, 7), 2, 2, 16, KL16), vae_stride=8, patch_size=1, img_size=[40, 56])
    assert f"--checkpoint '{path}' --heads N" in export_cli("inspect", path).stdout
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    one_line_error(export_cli("inspect", tmp_path / "page.pth"), 1, "is a web page")
