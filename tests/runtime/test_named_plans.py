"""Plans as people name them, and what they leave open: it comes from the model, whatever the way in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from jobs import ARCHITECTURES, PLAN_DEFAULTS

from gtr_deploy.runtime.errors import BundleError, PlanError, UsageError
from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.sampling.named import named_plan, split_plans
from gtr_deploy.runtime.sampling.plan import PRESETS, PlanSettings

DIGITS, DEFAULTS = ARCHITECTURES["mar-digits"], PLAN_DEFAULTS["mar-digits"]


def named(text: str, **changes: Any) -> Any:
    return named_plan(text, DIGITS, DEFAULTS, changes).settings


def test_settings_left_open_come_from_the_model(digits_pipeline: Pipeline) -> None:
    """A preset's settings in Python, without the model's own, once gave noise without a word."""
    for name in PRESETS:
        assert digits_pipeline.plan(PRESETS[name]) == digits_pipeline.plan(name)
    own = digits_pipeline.plan(PlanSettings("mine", (4, 2, 1))).settings
    assert (own.cfg, own.temperature, own.max_timestep) == (2.0, 0.9, 950)
    assert digits_pipeline.plan(PlanSettings("mine", (4, 2, 1), cfg=1.0, max_timestep=999)).settings.cfg == 1.0
    images = [digits_pipeline.generate([3], plan=plan).images for plan in ("gtr-fast", PRESETS["gtr-fast"])]
    assert np.array_equal(*images)


def test_changes_in_python(digits_pipeline: Pipeline) -> None:
    found = digits_pipeline.plan("gtr", stage_steps=(4, 2, 1), cfg=3).settings
    assert (found.stage_steps, found.cfg, found.max_timestep) == ((4, 2, 1), 3, 950)
    assert digits_pipeline.plan(PRESETS["gtr"], cfg=3) == digits_pipeline.plan("gtr", cfg=3)
    with pytest.raises(PlanError, match="a plan has no setting 'steps'"):
        digits_pipeline.plan("gtr", steps=3)
    with pytest.raises(PlanError, match="stage 1 has 16 tokens"):
        digits_pipeline.plan("gtr", stage_steps=(24, 7, 2))  # somebody's own choice is not cut
    with pytest.raises(UsageError, match="resolved already"):
        digits_pipeline.plan(digits_pipeline.plan("gtr"), cfg=3)
    for nonsense in (3, None, ["gtr"]):
        with pytest.raises(UsageError, match="is neither a name nor settings"):
            digits_pipeline.plan(nonsense)  # type: ignore[arg-type]


def test_changes_in_the_name() -> None:
    found = named("gtr:cfg=3,fts=none,stage-steps=8+4+1,generation-diffusion=30,decoder=compact")
    assert replace(found, name="gtr") == named(
        "gtr", cfg=3.0, fts="none", stage_steps=(8, 4, 1), generation_diffusion=(30, 30), context="compact"
    )
    assert found.name.startswith("gtr:cfg=3")
    assert named("gtr:guidance-interval=0.2+1").guidance_interval == (0.2, 1.0)
    assert len(named("gtr:stages=2").stage_steps) == 2
    assert named("gtr:cfg=3", cfg=4.0).cfg == 4.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "plan '' is not one of mar, "),
        ("gtr:", "'' is no change of a plan"),
        ("gtr:cfg", "'cfg' is no change of a plan"),
        ("gtr:name=x", "'name=x' is no change of a plan"),
        ("gtr:cfg=much", "cfg 'much' is no number"),
        ("gtr:cfg=nan", "cfg nan is not in 0..100"),
        ("gtr:stage_steps=8+x", "stage_steps '8+x' is no number"),
        ("gtr:guidance-interval=0.2", "guidance interval (0.2,) is not two shares"),
        ("gtr:stages=9", "stages 9 is not in 1..8"),
        ("gtr:stage_steps=" + "+".join(["1"] * 100), "100 stages on a 8x8 grid; use fewer stages"),
        ("gtr:stages=2,stage_steps=1+1+1", "stages 2 contradicts stage steps with 3 numbers"),
        ("gtr:fts=best", "FTS rule 'best' is not one of"),
        ("gtr:\x1b[2J=3", "is no change of a plan"),
        ("gtr:" + "cfg=3," * 1000, "is longer than 300 characters"),
        ("nope:cfg=3", "plan 'nope' is not one of"),
    ],
)
def test_names_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(PlanError) as caught:
        named(text)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


def test_lists_of_plans() -> None:
    assert split_plans("gtr, mar,gtr:cfg=3,fts=none,mar") == ["gtr", "mar", "gtr:cfg=3,fts=none", "mar"]
    assert split_plans("gtr:cfg=3,gtr:cfg=4,fts=all") == ["gtr:cfg=3", "gtr:cfg=4,fts=all"]
    for text in ("", "gtr,", ",gtr", "gtr,,mar"):
        with pytest.raises(PlanError, match="names no plan between two commas"):
            split_plans(text)


def test_files(tmp_path: Path, run_cli: Callable[..., Result], digits_bundle: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(run_cli("plan", digits_bundle, "--plan", "gtr-fast", "--cfg", "3", "--json").stdout)
    found = named(str(path))
    assert replace(found, name="gtr-fast") == named("gtr-fast", cfg=3.0)
    path.write_text(json.dumps({"name": "own", "stage_steps": [4, 2, 1]}))  # by hand, all else is the model's
    assert named(str(path)).max_timestep == 950
    for content, error in (("{", BundleError), ("[]", PlanError), ('{"plan": 3}', PlanError), ('{"x": 3}', PlanError)):
        path.write_text(content)
        with pytest.raises(error):
            named(str(path))


def test_every_command_takes_them(run_cli: Callable[..., Result], digits_bundle: Path, tmp_path: Path) -> None:
    variant = "gtr-fast:stage-steps=1+1+1,generation-diffusion=2,reconstruction-diffusion=2,fts=none"
    for command in (
        ["plan", digits_bundle, "--plan", variant],
        ["generate", digits_bundle, "--classes", "3", "--plan", variant, "--out", tmp_path],
        ["bench", digits_bundle, "--plans", f"{variant},{variant},cfg=1", "--repeat", "1"],
        ["evaluate", digits_bundle, "--plans", variant, "--images", "10"],
    ):
        result = run_cli(*command)
        assert result.exit_code == 0, result.stderr


def test_compare(run_cli: Callable[..., Result], digits_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    short = ["--stage-steps", "1,1,2", "--generation-diffusion", "2", "--reconstruction-diffusion", "2"]
    plans = "gtr-fast,gtr-fast:cfg=1,fts=none"
    grid = tmp_path / "grid.png"
    result = run_cli("compare", digits_bundle, "--plans", plans, "--classes", "3,7", "--grid", grid, "--json", *short)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["plan"] for row in found["plans"]] == ["gtr-fast", "gtr-fast:cfg=1,fts=none"]
    assert found["plans"][0]["flops"] > found["plans"][1]["flops"]
    assert found["seeds"] == [0, 1]
    sheet = np.asarray(Image.open(grid))
    run_cli("generate", digits_bundle, "--classes", "3", "--plan", "gtr-fast", "--out", tmp_path / "one", *short)
    (picture,) = (tmp_path / "one").rglob("*.png")
    wanted = np.asarray(Image.open(picture).convert("RGB")).repeat(3, axis=0).repeat(3, axis=1)
    height, width = wanted.shape[:2]
    places = [(y, x) for y in range(20, 80) for x in range(80, 360)]
    assert any(np.array_equal(sheet[y : y + height, x : x + width], wanted) for y, x in places)
    for bad, code in ((["--plans", "gtr,", "--classes", "3"], 2), (["--classes", "3", "--grid", "x.gif"], 2)):
        assert run_cli("compare", digits_bundle, *bad).exit_code == code
    assert "nobody can read more" in run_cli("compare", digits_bundle, "--classes", "0-9", "--images", "2").stderr


def test_what_python_gets_wrong_is_a_usage_error(digits_bundle: Path) -> None:
    pipeline = Pipeline.load(digits_bundle, "onnxruntime", threads=1)
    assert repr(pipeline) == "<Pipeline mar-digits on onnxruntime cpu>"
    for wrong in ({"requests": 3}, {"requests": "37"}, {"requests": [3], "seeds": 7}, {"requests": [3], "plan": None}):
        with pytest.raises(UsageError):
            pipeline.generate(**wrong)  # type: ignore[arg-type]
    pipeline.close()
    assert "closed" in repr(pipeline)
    with pytest.raises(UsageError, match="is closed; load the bundle again"):
        pipeline.generate([3], plan="gtr-fast")
