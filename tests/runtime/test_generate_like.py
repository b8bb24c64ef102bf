"""gtr-run generate --like: a picture made again from its own settings, whoever wrote these."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from commands import runner
from generating import BACKEND, SHORT, ok, one_line, pictures, tree
from PIL import Image, PngImagePlugin

from gtr_deploy.runtime.cli import main
from gtr_deploy.runtime.pictures.png import read_settings, save_png

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def picture(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of six that were made together."""
    out = tmp_path_factory.mktemp("original")
    options = ("--classes", "3,7", "--images-per-class", "3", "--cfg", "2.5", "--seed", "9", "--out", str(out))
    ok(runner().invoke(main, ["generate", str(digits_bundle), *options, *SHORT], prog_name="gtr-run"))
    return pictures(out)[4]


def test_equal_bytes(run_cli: Cli, digits_bundle: Path, picture: Path, tmp_path: Path) -> None:
    result = ok(run_cli("generate", digits_bundle, "--like", picture, "--out", tmp_path, *BACKEND))
    assert "may differ" not in result.stderr
    assert (tmp_path / picture.name).read_bytes() == picture.read_bytes()
    before = tree(picture.parent)
    again = run_cli("generate", digits_bundle, "--like", picture, "--out", picture.parent, *BACKEND)
    one_line(again, 1, "1 of 1 pictures of this run")
    assert tree(picture.parent) == before


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"precision": "int8"}, "precision is int8 there and fp32 here; the new picture may differ"),
        ({"backend": "openvino", "bundle": "0" * 64}, f"bundle is {'0' * 12}… there and "),
        ({"bundle": None}, "bundle is missing there"),
    ],
)
def test_another_precision_or_backend_goes_on_and_says_so(
    run_cli: Cli, digits_bundle: Path, picture: Path, tmp_path: Path, changed: dict[str, Any], line: str
) -> None:
    own, out = tmp_path / "own.png", tmp_path / "out"
    save_png(own, np.zeros((32, 32, 3), np.uint8), {**read_settings(picture), **changed})
    result = ok(run_cli("generate", digits_bundle, "--like", own, "--out", out, *BACKEND))
    assert [found for found in result.stderr.splitlines() if line in found and str(own) in found]
    assert (out / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "mar-h"}, "another model: model is mar-h there and mar-digits here"),
        ({"model": ["\x1b[31m"]}, "another model"),
        ({"class": 10}, "class 10 is not in 0..9"),
        ({"class": "3"}, "is not a whole number"),
        ({"class": None}, "is not a whole number"),
        ({"class_name": "cat"}, "class_name is cat there"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
        ({"seed": True}, "seed True"),
        ({"seed": None}, "seed None"),
        ({"plan": None}, "there is no plan"),
        ({"plan": {}}, "name"),
        ({"plan": {"name": "x" * 5000, "stage_steps": [1, 1]}}, "at most 300"),
        ({"plan": {"name": 3, "stage_steps": [1, 1]}}, "name"),
        ({"plan": {"name": "x", "stage_steps": 3}}, "stage steps 3"),
        ({"plan": {"name": "x", "stage_steps": [[1]]}}, "stage steps"),
        ({"plan": {"name": "x", "stage_steps": [10**400]}}, "stage 1 has 64 tokens"),
        ({"plan": {"name": "x", "stage_steps": [1] * 100_000}}, "use fewer stages"),
        ({"plan": {"name": "x", "stage_steps": [1], "cfg": "2"}}, "cfg '2'"),
        ({"plan": {"name": "x", "stage_steps": [1], "fts_diffusion": 10**9}}, "FTS diffusion steps"),
        ({"plan": {"name": "x", "stage_steps": [1], "order": {"a": 1}}}, "order"),
        ({"plan": {"name": "x", "stage_steps": [1], "\x1b[2J": 1}}, "unknown"),
    ],
)
def test_hostile_settings(
    run_cli: Cli, digits_bundle: Path, picture: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    own, out = tmp_path / "own.png", tmp_path / "out"
    save_png(own, np.zeros((32, 32, 3), np.uint8), {**read_settings(picture), **changed})
    result = run_cli("generate", digits_bundle, "--like", own, "--out", out, *BACKEND)
    one_line(result, 1, "own.png", words)
    assert len(result.stderr) < 600
    assert result.stderr.removesuffix("\n").isprintable()
    assert not out.exists()


def test_a_plan_that_is_called_like_a_path(run_cli: Cli, digits_bundle: Path, picture: Path, tmp_path: Path) -> None:
    own, out, settings = tmp_path / "own.png", tmp_path / "a" / "b", read_settings(picture)
    settings["plan"]["name"] = "../../x"
    save_png(own, np.zeros((32, 32, 3), np.uint8), settings)
    ok(run_cli("generate", digits_bundle, "--like", own, "--out", out, *BACKEND))
    made, original = pictures(tmp_path)
    assert (made.parent, original) == (out, own)
    assert re.fullmatch(r"class7-plan-[0-9a-f]{8}-seed000013\.png", made.name)


def test_pngs_that_are_none_of_ours(run_cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
    arguments = ("generate", digits_bundle, "--out", tmp_path / "out", "--like")
    Image.new("RGB", (32, 32)).save(tmp_path / "plain.png")
    one_line(run_cli(*arguments, tmp_path / "plain.png"), 1, "plain.png holds no settings")
    Image.new("1", (15000, 15000)).save(tmp_path / "large.png")  # Pillow only warns of it
    one_line(run_cli(*arguments, tmp_path / "large.png"), 1, "large.png is a damaged PNG file", "bomb")
    (tmp_path / "text.png").write_text("x")
    one_line(run_cli(*arguments, tmp_path / "text.png"), 1, "text.png is not a PNG file")
    info = PngImagePlugin.PngInfo()
    info.add_text("gtr-deploy", "[" * 50_000_000, zip=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "text.png", pnginfo=info)
    one_line(run_cli(*arguments, tmp_path / "text.png"), 1, "text.png is a damaged PNG file")
    assert not (tmp_path / "out").exists()


def test_it_says_all(run_cli: Cli, digits_bundle: Path, picture: Path, tmp_path: Path) -> None:
    arguments = ("generate", digits_bundle, "--like", picture, "--out", tmp_path / "out")
    for options in (["--classes", "3"], ["--plan", "gtr"], ["--seed", "0"], ["--images", "2"], ["--cfg", "2"]):
        one_line(run_cli(*arguments, *options), 2, "leave out --")
