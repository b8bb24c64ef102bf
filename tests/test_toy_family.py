"""A second model family moves in: one file on each side (tests/toy), and a row in each table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from toy.family import TOY
from toy.family_torch import TOY_ENTRY, TOY_EXPORT

from gtr_deploy.export.build.build import BuildRequest, build
from gtr_deploy.export.families import FAMILIES as EXPORT_FAMILIES
from gtr_deploy.export.verify.verify import verify
from gtr_deploy.export.zoo import MODELS
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import PlanError, UsageError
from gtr_deploy.runtime.models.families import FAMILIES
from gtr_deploy.runtime.pipeline import Pipeline


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    monkeypatch.setitem(EXPORT_FAMILIES, "toy", TOY_EXPORT)
    monkeypatch.setitem(MODELS, "toy", TOY_ENTRY)


@pytest.fixture
def toy_bundle(tmp_path: Path) -> Path:
    request = BuildRequest("toy", tmp_path / "toy", random_weights=True, max_batch=4)
    return build(request, Reporter(quiet=True)).bundle


def test_it_is_built_verified_and_generates(toy_bundle: Path, tmp_path: Path, run_cli: Callable[..., Result]) -> None:
    report = verify(toy_bundle, Reporter(quiet=True), plans=["gtr", "slow"])
    assert report.reached == "images", [check for check in report.checks if check.status != "ok"]

    out = tmp_path / "pictures"
    done = run_cli(
        "generate", toy_bundle, "--images", "3", "--backend", "onnxruntime", "--out", out, "--grid", out / "grid.png",
        "--trace", tmp_path / "trace.gif", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [Path(image["file"]).name for image in document["images"]] == [
        f"unconditional-gtr-seed{seed:06d}.png" for seed in range(3)
    ]
    assert run_cli("bench", toy_bundle, "--backend", "onnxruntime", "--repeat", "1").exit_code == 0
    assert run_cli("plan", toy_bundle, "--plan", "slow").exit_code == 0


def test_one_seed_is_one_image_on_a_grid_that_is_no_square(toy_bundle: Path) -> None:
    pipeline = Pipeline.load(toy_bundle, backend="onnxruntime", threads=1)
    together = pipeline.generate([None] * 3, seeds=[5, 6, 7], plan="gtr")
    alone = pipeline.generate([None], seeds=[6], plan="gtr")
    assert together.images.shape == (3, 12, 18, 3)
    np.testing.assert_allclose(together.latents[1], alone.latents[0], atol=1e-5 * np.abs(alone.latents).max())


def test_what_it_cannot_be_asked_for_is_one_line(toy_bundle: Path, run_cli: Callable[..., Result]) -> None:
    pipeline = Pipeline.load(toy_bundle, backend="onnxruntime", threads=1)
    with pytest.raises(UsageError, match="nothing to ask for"):
        pipeline.generate([3])
    with pytest.raises(PlanError, match="guided"):
        pipeline.plan(replace(pipeline.plan("gtr").settings, cfg=3.0))
    done = run_cli("generate", toy_bundle, "--classes", "3", "--out", toy_bundle.parent / "out")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "--classes" in done.stderr
