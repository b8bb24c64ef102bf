"""A bundle without a decoder: latents come out, everything that needs pictures says so in one line."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from fakes.bundles import add_fake_engines, fake_host
from fakes.machine import FakeMachine

from gtr_deploy.export.build.build import build
from gtr_deploy.export.build.request import BuildRequest, OwnModel
from gtr_deploy.export.verify import verify as verify_module
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import BackendError, GtrError, UsageError
from gtr_deploy.runtime.machine import examine as machine_module
from gtr_deploy.runtime.pipeline import Pipeline

Cli = Callable[..., Result]
WITHOUT = OwnModel(decoder="none")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    request = BuildRequest("mar-digits", tmp_path_factory.mktemp("digits") / "b", own=WITHOUT)
    result = build(request, Reporter(quiet=True))
    assert "decoder" not in result.stages
    assert build(request, Reporter(quiet=True)).unchanged
    return result.bundle


def test_the_latents_are_those_of_the_model_with_one(bundle: Path, digits_pipeline: Pipeline) -> None:
    with Pipeline.load(bundle, "onnxruntime", threads=1) as pipeline:
        made = pipeline.generate([3, 5, 7], plan="gtr-fast", batch_size=2)
        wanted = digits_pipeline.generate([3, 5, 7], plan="gtr-fast", batch_size=2)
        assert np.array_equal(made.latents, wanted.latents)
        assert made.pictures is None
        with pytest.raises(UsageError, match="this model has no decoder and makes no images; take the latents"):
            assert made.images
        with pytest.raises(BackendError, match="this bundle has no decoder graph"):
            pipeline.backend.decode(made.latents)


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_other_backends_open_it(bundle: Path, digits_pipeline: Pipeline, backend: str) -> None:
    with Pipeline.load(bundle, backend, threads=1) as pipeline:
        latents = pipeline.generate([3], plan="gtr-fast").latents
        wanted = digits_pipeline.generate([3], plan="gtr-fast").latents
        assert np.linalg.norm(latents - wanted) <= 1e-3 * np.linalg.norm(wanted)
        with pytest.raises(BackendError, match="has no decoder"):
            pipeline.backend.decode(latents)


def test_generate_writes_latents(bundle: Path, run_cli: Cli, tmp_path: Path, digits_pipeline: Pipeline) -> None:
    out = tmp_path / "out"
    options = ["generate", bundle, "--plan", "gtr-fast", "--backend", "onnxruntime", "--threads", "1", "--out", out]
    done = run_cli(*options, "--classes", "3,5", "--seed", "7", "--save-latents", tmp_path / "all.npz", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    files = [Path(image["file"]) for image in document["images"]]
    assert [file.name for file in files] == ["class3-gtr-fast-seed000007.npz", "class5-gtr-fast-seed000008.npz"]
    assert sorted(out.iterdir()) == [*files, out / "run.json"]
    wanted = digits_pipeline.generate([3, 5], seeds=[7, 8], plan="gtr-fast").latents
    for file, latents in zip(files, wanted, strict=True):
        with np.load(file) as archive:
            assert np.array_equal(archive["latents"], latents)
            settings = json.loads(archive["settings.json"])
        assert (settings["bundle"], settings["plan"]["name"]) == (Bundle.load(bundle).digest, "gtr-fast")
    with np.load(tmp_path / "all.npz") as archive:
        assert np.array_equal(archive["latents"], wanted)


def test_a_run_goes_on_where_it_stopped(bundle: Path, run_cli: Cli, tmp_path: Path) -> None:
    options = ["generate", bundle, "--plan", "gtr-fast", "--backend", "onnxruntime", "--out", tmp_path]
    done = run_cli(*options, "--classes", "0-2", "--batch-size", "1")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("3 latents in ")
    files = sorted(tmp_path.glob("*.npz"))
    whole = [file.read_bytes() for file in files]
    refused = run_cli(*options, "--classes", "0-2")
    assert refused.exit_code == 1
    assert "3 of 3 pictures of this run are in" in refused.stderr
    files[0].write_bytes(whole[0][:-5])
    files[2].unlink()
    done = run_cli(*options, "--classes", "0-2", "--batch-size", "1", "--resume")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("2 latents in ")
    assert ", 1 were there -> " in done.stdout
    assert [file.read_bytes() for file in files] == whole


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"latents.npy": b"x"}, "holds no settings (KeyError); another program's file?"),
        ({"settings.json": b"{"}, "holds no settings (JSONDecodeError)"),
        ({"settings.json": b"[" * 100_000}, "holds no settings (RecursionError)"),
        ({"settings.json": b" " * (1 << 21) + b"{}"}, "holds no settings (JSONDecodeError)"),
        ({"settings.json": b"[]"}, "the settings in it are not a JSON object"),
        (
            {"settings.json": b'{"model": "other"}'},
            "is a picture of another run: model is other there and mar-digits here",
        ),
    ],
)
def test_files_that_somebody_else_left_there(
    bundle: Path, run_cli: Cli, tmp_path: Path, members: dict[str, bytes], words: str
) -> None:
    with zipfile.ZipFile(tmp_path / "class0-gtr-fast-seed000000.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    for more in ([], ["--resume"]):
        done = run_cli("generate", bundle, "--classes", "0", "--plan", "gtr-fast", "--out", tmp_path, *more)
        assert done.exit_code == 1, done.output
        assert words in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["generate", "--classes", "0", "--out", "o", "--grid", "g.png"], "--grid"),
        (["generate", "--classes", "0", "--out", "o", "--trace", "t.gif"], "--trace"),
        (["generate", "--like", "p.png", "--out", "o"], "--like"),
        (["compare", "--classes", "0"], "compare"),
        (["evaluate"], "evaluate"),
    ],
)
def test_what_needs_pictures_says_so(
    bundle: Path, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.png").write_bytes(b"")
    done = run_cli(arguments[0], bundle, *arguments[1:])
    assert done.exit_code == 2, done.output
    wanted = f"gtr-run: {what} needs pictures, and {bundle} has no decoder; build it without --no-decoder"
    assert done.stderr.splitlines()[-1] == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_what_needs_none_works(bundle: Path, run_cli: Cli, export_cli: Cli) -> None:
    done = run_cli("bench", bundle, "--plan", "gtr-fast", "--repeat", "1", "--backend", "onnxruntime", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["measurements"][0]["shares"]["decoder"] == 0
    done = run_cli("doctor", bundle, "--json")
    assert "onnxruntime cpu" in json.loads(done.stdout)["can_run"]
    done = export_cli("inspect", bundle)
    assert "decoder    none; latents are what comes out: 1 channels, stride 1, patch 4, scale 1, shift 0" in done.stdout


def checks(report: dict[str, Any], rung: str) -> list[tuple[str, str, str]]:
    return [(c["subject"], c["status"], c["note"]) for c in report["checks"] if c["rung"] == rung]


NOTE = "not reachable without a decoder; whole latents are compared on the rung graphs"


def test_verify_ends_on_the_rung_below_pictures(bundle: Path, export_cli: Cli) -> None:
    done = export_cli("verify", bundle, "--plans", "gtr-fast", "--images", "1", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["rung_reached"] == "graphs"
    assert checks(report, "images") == [("all", "skipped", NOTE)]
    assert ("plan gtr-fast, torch fp32", "ok", "worst of 1 images") in checks(report, "graphs")
    assert not [check for check in report["checks"] if "decoder" in check["subject"]]


def test_verify_with_engines(
    bundle: Path, export_cli: Cli, fake_gpu: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (machine_module, verify_module):
        monkeypatch.setattr(module, "examine_machine", lambda: fake_host(fake_gpu))
    own = Path(shutil.copytree(bundle, tmp_path / "b"))
    add_fake_engines(own, plans=("gtr-fast",))
    done = export_cli("verify", own, "--backend", "tensorrt", "--images", "1", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["rung_reached"] == "graphs"
    assert checks(report, "images") == [("all", "skipped", NOTE)]


def test_a_manifest_cannot_say_otherwise(bundle: Path, own_bundle: Path, tmp_path: Path) -> None:
    for folder, kind in ((own_bundle, "none"), (bundle, "patches")):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["model"]["decoder"]["kind"] = kind
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(GtrError, match=r"manifest\.json: graphs are \["):
            Bundle.load(tmp_path)
