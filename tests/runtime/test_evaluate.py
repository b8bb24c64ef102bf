"""gtr-run evaluate as a person types it: figures, resumed runs, and one line for everything that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from msgspec import structs

from gtr_deploy.runtime.backends.row import BackendOptions
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands import evaluate as module
from gtr_deploy.runtime.errors import GtrError, UsageError
from gtr_deploy.runtime.models.architecture import Decoder
from gtr_deploy.runtime.models.families import known_models
from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.quality import inception as quality_inception
from gtr_deploy.runtime.quality.digits import METRICS, DigitsMeasure, digit_figures, real_digits
from gtr_deploy.runtime.sampling.plan import PlanSettings

Cli = Callable[..., Result]
FEW = ["--stage-steps", "2,1,1", "--generation-diffusion", 8, "--reconstruction-diffusion", 5, "--fts-diffusion", 8]
FEW += ["--threads", 1, "--batch-size", 10]


def _one_line(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.splitlines()[-1].startswith("gtr-run")
    for word in words:
        assert word in result.stderr.splitlines()[-1]


def test_figures_are_those_of_the_pictures(run_cli: Cli, digits_bundle: Path, digits_pipeline: Pipeline) -> None:
    options = ["--plans", "gtr-fast,gtr-compact", "--images", 25, "--seed", 7, *FEW]
    result = run_cli("evaluate", digits_bundle, *options, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert result.stderr == ""
    fast, compact = report["plans"]
    assert [fast["plan"]["name"], compact["plan"]["name"]] == ["gtr-fast", "gtr-compact"]
    assert fast["plan"]["stage_steps"] == [2, 1, 1]  # overrides go for every plan
    assert compact["plan"]["context"] == "compact"
    labels = [index % 10 for index in range(25)]
    settings = PlanSettings.from_json(fast["plan"])
    made = digits_pipeline.generate(labels, [7 + index for index in range(25)], settings)
    wanted = digit_figures(real_digits().sample(made.images, labels), real_digits())
    assert set(fast["figures"]) == set(METRICS)
    for name, estimate in wanted.items():
        assert fast["figures"][name]["value"] == pytest.approx(estimate.value, rel=1e-3)
        assert fast["figures"][name]["low"] <= fast["figures"][name]["value"] <= fast["figures"][name]["high"]
    assert fast["difference"] == {}
    found = compact["difference"]["frechet_distance"]
    apart = compact["figures"]["frechet_distance"]["value"] - fast["figures"]["frechet_distance"]["value"]
    assert found["value"] == pytest.approx(apart)
    assert fast["seconds_per_image"] > 0
    assert fast["generated"] == 25
    assert fast["flops"] == made.plan.flops


def test_a_stopped_run_goes_on(
    run_cli: Cli, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["evaluate", digits_bundle, "--plan", "gtr-fast", "--images", 30, *FEW, "--save-images", tmp_path / "s"]
    counted: list[int] = []
    real = Pipeline.generate

    def generate(self, labels, *rest, **options):
        if len(counted) == 2 and counted[-1] != -1:
            counted.append(-1)
            raise KeyboardInterrupt
        counted.append(len(labels))
        return real(self, labels, *rest, **options)

    monkeypatch.setattr(Pipeline, "generate", generate)
    assert run_cli(*arguments).exit_code == 130
    assert counted == [10, 10, -1]
    second = run_cli(*arguments, "--json")
    assert second.exit_code == 0, second.output
    assert counted == [10, 10, -1, 10]
    assert len(list((tmp_path / "s" / "gtr-fast").glob("*.png"))) == 30
    resumed = json.loads(second.stdout)["plans"][0]
    assert resumed["generated"] == 10
    whole = json.loads(run_cli(*arguments[:-2], "--json").stdout)["plans"][0]
    assert resumed["figures"] == whole["figures"]
    third = run_cli(*arguments, "--plot", tmp_path / "p.png")
    _one_line(third, 1, "--plot needs times")
    assert "1,797 real digits" in third.stdout
    _one_line(run_cli(*arguments, "--seed", 1), 1, "000000.png was made with another seed", "another folder")
    _one_line(run_cli(*arguments, "--cfg", 3), 1, "made with another plan")


def test_table_plot_and_uneven_classes(run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
    options = ["--plans", "gtr,gtr-fast", "--images", 23, *FEW, "--plot", tmp_path / "a" / "q.png"]
    result = run_cli("evaluate", digits_bundle, *options)
    assert result.exit_code == 0, result.output
    assert "23 images over 10 classes: the first 3 get one more" in result.stderr
    for word in ("Frechet distance", "accuracy", "difference from gtr, image by image", "1,797 real digits"):
        assert word in result.stdout
    assert "intervals of the Frechet distance overlap: gtr and gtr-fast; on these numbers alone" in result.stdout
    assert (tmp_path / "a" / "q.png").read_bytes().startswith(b"\x89PNG")


def test_two_images_are_enough(run_cli: Cli, digits_bundle: Path) -> None:
    result = run_cli("evaluate", digits_bundle, "--images", 2, *FEW, "--json")
    figures = json.loads(result.stdout)["plans"][0]["figures"]
    assert figures["frechet_distance"]["low"] is None
    assert "diversity_ratio" not in figures


def test_wrong_requests_are_one_line(run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for code, options, words in (
        (2, ["--images", "1"], ["--images"]),
        (2, ["--plans", "best"], ["plan 'best' is not one of"]),
        (2, ["--plans", "gtr,"], ["names no plan between two commas"]),
        (2, ["--plans", "gtr,gtr"], ["gtr stands there twice"]),
        (2, ["--seed", "-1"], ["--seed"]),
        (2, ["--plot", "a.jpg"], ["--plot a.jpg does not end in .png"]),
        (2, ["--plot", tmp_path], ["--plot"]),
        (1, ["--plot", tmp_path / "file" / "p.png"], ["cannot be written"]),
        (2, ["--reference", tmp_path / "gone.npz"], ["--reference", "does not exist"]),
        (2, ["--reference", tmp_path / "file"], ["--reference is for ImageNet models"]),
        (2, ["--inception-weights", tmp_path / "file"], ["--inception-weights is for ImageNet models"]),
        (2, ["--save-images", tmp_path / "file"], ["--save-images"]),
        (2, ["--max-timestep", "1000"], ["max timestep 1000"]),
    ):
        _one_line(run_cli("evaluate", digits_bundle, *options), code, *words)
    _one_line(run_cli("evaluate", tmp_path / "no"), 1, "is not a folder")


def _bundle(model: str, **changes: Any) -> Bundle:
    """A bundle of a known model that has no files."""
    known = known_models()[model]
    architecture = structs.replace(known.architecture, **changes)
    return Bundle(Path("nowhere"), None, architecture, known.conditioner)  # type: ignore[arg-type]


def test_imagenet_models_need_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet, engine = _bundle("mar-b"), BackendOptions(provider="cuda", device=1)
    with pytest.raises(UsageError, match=r"mar-b: give --reference FILE.*adm_in256_stats"):
        module.open_measure(imagenet, None, None, engine)
    (tmp_path / "r.npz").write_text("x")
    with pytest.raises(GtrError, match="is not an npz file"):
        module.open_measure(imagenet, tmp_path / "r.npz", None, engine)
    opened: list[object] = []
    monkeypatch.setattr(quality_inception, "FEATURES", 2)
    monkeypatch.setattr(quality_inception, "open_inception", lambda *given: opened.append(given))
    np.savez(tmp_path / "r.npz", mu=np.zeros(2), sigma=np.eye(2))
    measure = module.open_measure(imagenet, tmp_path / "r.npz", tmp_path / "w.pth", engine)
    assert opened == [(tmp_path / "w.pth", "cuda:1")]
    assert measure.reference == str(tmp_path / "r.npz")
    assert isinstance(module.open_measure(_bundle("mar-digits"), None, None, engine), DigitsMeasure)
    odd = Decoder(kind="patches", stride=1, patch=3)
    with pytest.raises(UsageError, match="24x21 pictures; digits are compared as 8x8"):
        module.open_measure(_bundle("mar-digits", decoder=odd, grid=(8, 7), token_channels=9), None, None, engine)


def test_help_says_the_protocol(run_cli: Cli) -> None:
    text = " ".join(run_cli("evaluate", "--help").stdout.split())
    for words in ("--plan, --plans", "50 of each class", "--images 50000", "EMA weights", "--save-images"):
        assert words in text


def test_an_imagenet_model_from_end_to_end(
    run_cli: Cli, own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mar-digits with other names for its classes, and three colours for features."""
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["conditioning"]["class_names"] = [f"breed {index}" for index in range(10)]
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["evaluate", own_bundle, "--plans", "gtr-fast,gtr", "--images", 20, *FEW]
    _one_line(run_cli(*arguments), 2, "give --reference FILE, the statistics of real pictures")
    np.savez(tmp_path / "r.npz", mu=np.zeros(3), sigma=np.eye(3))

    def extract(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        colours = images.mean(axis=(1, 2))
        return colours, np.stack([colours[:, 0] / 255, 1 - colours[:, 0] / 255], axis=1)

    monkeypatch.setattr(quality_inception, "FEATURES", 3)
    monkeypatch.setattr(quality_inception, "open_inception", lambda weights, device: extract)
    result = run_cli(*arguments, "--reference", tmp_path / "r.npz")
    assert result.exit_code == 0, result.output
    assert "r.npz" in result.stdout
    assert "accuracy" not in result.stdout
    assert "difference" not in result.stdout
