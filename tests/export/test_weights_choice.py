"""What the weights of a bundle are: asked for, said, kept in the manifest and in pictures, and found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from commands import one_line_error
from safetensors.torch import load_file, save_file

from gtr_deploy.export.build.checkpoints import random_mar
from gtr_deploy.export.build.digests import file_sha256
from gtr_deploy.export.build.request import WEIGHTS, BuildRequest
from gtr_deploy.export.build.sources import resolve_weights, weights_of_bundle
from gtr_deploy.export.build.state_dicts import CHOICES
from gtr_deploy.export.zoo import MODELS
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.bundle.source import Source, WeightsFile
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import BundleError
from gtr_deploy.runtime.pictures.png import read_settings

Cli = Callable[..., Result]
DIGITS = MODELS["mar-digits"]


@pytest.fixture(scope="module")
def young(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose model is trained and whose EMA is not."""
    assert DIGITS.shipped is not None
    path = tmp_path_factory.mktemp("young") / "a.pth"
    torch.save({"model": load_file(DIGITS.shipped), "model_ema": random_mar(DIGITS.architecture, 0)}, path)
    return path


def build(cli: Cli, out: Path, checkpoint: Path, *more: str) -> Result:
    return cli("build", "--model", "mar-digits", "--checkpoint", checkpoint, "--out", out, *more)


def test_an_untrained_ema_and_the_trained_model(export_cli: Cli, run_cli: Cli, young: Path, tmp_path: Path) -> None:
    out, digest = tmp_path / "bundle", file_sha256(young)
    first = build(export_cli, out, young)
    assert first.exit_code == 0, first.output
    assert f"weights: model_ema of {young}\nwarning: model_ema is hardly trained: " in first.stderr
    keys = dict(Bundle.load(out).manifest.source.stages)

    checked = export_cli("verify", out, "--plans", "gtr-fast", "--images", "1")
    assert "warning: model_ema is hardly trained" in checked.stderr
    assert "sensitive to the respacing" not in checked.stderr, "that is the t = 999 of a small model, which this is not"
    report = json.loads((out / "reports" / "parity.json").read_text())
    assert "--weights model" in report["weights_warning"]
    assert report["respacing"] is None

    second = build(export_cli, out, young, "--weights", "model")
    assert f"weights: model (its EMA weights are left out) of {young}\n" in second.stderr
    assert "warning" not in second.stderr
    source = Bundle.load(out).manifest.source
    assert source.checkpoint == WeightsFile(str(young.resolve()), digest, "model", "model", "")
    changed = {kind for kind, key in source.stages.items() if keys[kind] != key}
    assert changed == {"backbone", "modulation", "diffusion_step"}, "the choice is part of a stage's key"

    shown = export_cli("inspect", out).stdout
    assert "the model's own, not EMA (model); " in shown
    assert json.loads(export_cli("inspect", out, "--json").stdout)["source"]["checkpoint"]["weights"] == "model"
    made = run_cli("generate", out, "--classes", "3", "--plan", "gtr-fast", "--out", tmp_path / "g")
    assert made.exit_code == 0, made.output
    (picture,) = (tmp_path / "g").glob("*.png")
    assert read_settings(picture)["weights"] == f"model sha256:{digest[:12]}"

    weights, why = weights_of_bundle(Bundle.load(out), None, None, Reporter(quiet=True))
    assert weights is not None, why
    assert DIGITS.shipped is not None
    assert torch.equal(weights.checkpoint()["mask_token"], load_file(DIGITS.shipped)["mask_token"])


def test_a_bare_file_says_that_nobody_knows(export_cli: Cli, tmp_path: Path) -> None:
    assert DIGITS.shipped is not None
    path = tmp_path / "a.safetensors"
    save_file({f"module.{key}": value for key, value in load_file(DIGITS.shipped).items()}, path)
    refused = build(export_cli, tmp_path / "b", path, "--weights", "ema")
    one_line_error(refused, 1, str(path), "does not say that it holds EMA weights")
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    source = resolve_weights(BuildRequest("mar-digits", tmp_path / "b", path), reporter).source({})
    assert source.checkpoint is not None
    assert (source.checkpoint.weights, source.checkpoint.key, source.checkpoint.prefix) == ("unknown", "", "module.")
    assert len(said) == 1
    assert said[0].startswith(f"weights: state dict, without the prefix module. of {path}; nothing in it says whether")


def test_the_shipped_file_is_known_to_be_ema(digits_bundle: Path) -> None:
    source = Bundle.load(digits_bundle).manifest.source
    assert source.checkpoint is not None
    assert source.checkpoint.weights == "ema"
    assert source.label == f"ema sha256:{source.checkpoint.sha256[:12]}"


def test_the_choice_is_part_of_the_identity_and_contradicts_random_weights(
    export_cli: Cli, young: Path, tmp_path: Path
) -> None:
    identities = {
        resolve_weights(BuildRequest("mar-digits", tmp_path, young, weights=wanted), Reporter(quiet=True)).identity(
            "checkpoint"
        )
        for wanted in WEIGHTS
    }
    assert len(identities) == len(WEIGHTS) == len(CHOICES)
    result = export_cli("build", "--model", "mar-digits", "--random-weights", "--weights", "ema")
    one_line_error(result, 2, "--random-weights and --weights ema contradict each other")


@pytest.mark.parametrize(
    ("file", "label"),
    [
        (("ema", "model_ema", ""), "model_ema sha256:aaaaaaaaaaaa"),
        (("ema", "state_dict", "ema_model.module."), "state_dict.ema_model.module sha256:aaaaaaaaaaaa"),
        (("unknown", "state_dict", ""), "state_dict (unknown) sha256:aaaaaaaaaaaa"),
        (("unknown", "", ""), "unknown sha256:aaaaaaaaaaaa"),
        (None, "random (seed 0)"),
    ],
)
def test_labels(file: tuple[str, str, str] | None, label: str) -> None:
    checkpoint = file and WeightsFile("/a", "a" * 64, *file)  # type: ignore[arg-type]
    assert Source(checkpoint or None, None, None if file else 0, {}, None).label == label


def test_a_bundle_of_before_names_the_rebuild(own_bundle: Path) -> None:
    path = own_bundle / "manifest.json"
    document = json.loads(path.read_text())
    for name in ("weights", "key", "prefix"):
        del document["source"]["checkpoint"][name]
    path.write_text(json.dumps(document))
    with pytest.raises(
        BundleError, match=r"missing required field `weights`.*; rebuild the bundle with gtr-export build$"
    ):
        Bundle.load(own_bundle)


def test_a_pointer_of_git_lfs_inside_a_bundle(own_bundle: Path) -> None:
    bundle = Bundle.load(own_bundle)
    (file, *_) = bundle.graphs["backbone"].files
    (own_bundle / file.file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 7\n")
    with pytest.raises(BundleError, match=r"is a Git LFS pointer, not the file; run git lfs pull in the bundle"):
        bundle.graph_paths()
