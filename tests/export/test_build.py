"""Building: cached stages, a kill at any moment, two builds at once, folders in the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gtr_deploy.export.build import float_bundle
from gtr_deploy.export.build.build import build
from gtr_deploy.export.build.request import BuildRequest, OwnModel, default_out
from gtr_deploy.runtime.bundle import staged as folders
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import BundleError, GtrError, UsageError
from gtr_deploy.runtime.models.graphs import NETWORKS, ROW_GRAPHS

KINDS = (*NETWORKS, *ROW_GRAPHS)
QUIET = Reporter(quiet=True)


def _states(**changed: str) -> dict[str, str]:
    return {**dict.fromkeys([*KINDS, "manifest"], "cached"), **changed}


def test_second_build_does_nothing_and_quickly(own_bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in own_bundle.rglob("*")}
    start = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "gtr_deploy.export.cli",
        "build",
        "--model",
        "mar-digits",
        "--out",
        str(own_bundle),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 5
    assert "is up to date" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in own_bundle.rglob("*")} == before


def test_only_what_changed_is_built_again(own_bundle: Path) -> None:
    result = build(BuildRequest("mar-digits", own_bundle, max_batch=4), QUIET)
    assert result.stages == _states(manifest="built")
    assert Bundle.load(own_bundle).max_batch == 4
    (own_bundle / "graphs" / "detail_score.onnx").write_bytes(b"damaged")
    result = build(BuildRequest("mar-digits", own_bundle, max_batch=4), QUIET)
    assert result.stages == _states(manifest="built", detail_score="built")
    Bundle.load(own_bundle).graph_paths()


def test_another_checkpoint_rebuilds_its_graphs_only(own_bundle: Path) -> None:
    request = BuildRequest("mar-digits", own_bundle, random_weights=True)
    result = build(request, QUIET)
    assert result.stages == _states(manifest="built", backbone="built", modulation="built", diffusion_step="built")
    assert Bundle.load(own_bundle).manifest.source.random_weights == 0
    assert build(request, QUIET).unchanged


def test_force_builds_everything(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    real = float_bundle._export
    monkeypatch.setattr(float_bundle, "_export", lambda spec, *rest: built.append(spec.kind) or real(spec, *rest))
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)  # also the way of systems without an atomic exchange
    build(BuildRequest("mar-digits", own_bundle, force=True), QUIET)
    assert built == list(KINDS)
    Bundle.load(own_bundle).graph_paths()
    assert sorted(path.name for path in own_bundle.parent.iterdir()) == ["bundle"]


def test_precision_or_model_of_another_bundle_is_not_overwritten(own_bundle: Path) -> None:
    with pytest.raises(GtrError, match="holds mar-digits fp32, this build is mar-digits fp16; --force"):
        build(BuildRequest("mar-digits", own_bundle, precision="fp16"), QUIET)
    Bundle.load(own_bundle).graph_paths()


def test_folders_in_the_way(tmp_path: Path, own_bundle: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        build(BuildRequest("mar-digits", tmp_path / "file"), QUIET)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_text("x")
    for force in (False, True):
        with pytest.raises(GtrError, match="is in the way"):
            build(BuildRequest("mar-digits", tmp_path / "photos", force=force), QUIET)
    assert (tmp_path / "photos" / "me.png").read_text() == "x"
    (own_bundle / "manifest.json").write_text("{")
    with pytest.raises(GtrError, match=r"is in the way.*--force replaces it"):
        build(BuildRequest("mar-digits", own_bundle), QUIET)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (BuildRequest("mar-x", Path("o")), "model 'mar-x' is not one of"),
        (BuildRequest("mar-b", Path("o"), precision="fp4"), "precision 'fp4' is not one of"),
        (BuildRequest("mar-b", Path("o"), random_weights=True, checkpoint=Path("x")), "contradict each other"),
        (BuildRequest("mar-b", Path("o"), max_batch=0), "--max-batch 0"),
        (BuildRequest("mar-digits", Path("o"), vae=Path("x")), "mar-digits has no VAE"),
        (BuildRequest("mar-b", Path("o"), checkpoint=Path("none.pth")), "--checkpoint none.pth is not a file"),
    ],
)
def test_senseless_requests(
    request_: BuildRequest, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=reason):
        build(request_, QUIET)
    assert not Path("o").exists()


def test_two_builds_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    with folders.lock(tmp_path / "b"), pytest.raises(GtrError, match="another build is writing"):
        build(BuildRequest("mar-digits", tmp_path / "b"), QUIET)


def test_kill_leaves_no_bundle_or_the_old_one_and_the_next_build_resumes(tmp_path: Path) -> None:
    out = tmp_path / "b"
    partial = folders.partial_folder(out)
    command = [sys.executable, "-m", "gtr_deploy.export.cli", "build", "--model", "mar-digits", "--out", str(out)]

    def recorded() -> set[str]:
        record = partial / "stages.json"
        return set(json.loads(record.read_text())) if record.is_file() else set()

    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        # Killed when the first stage is on record and later ones are not.
        deadline = time.monotonic() + 120
        while not recorded() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    with pytest.raises(BundleError, match="did not finish"):
        Bundle.load(partial)
    done = recorded()
    assert done
    assert done < set(KINDS)
    result = build(BuildRequest("mar-digits", out), QUIET)
    assert {kind for kind, state in result.stages.items() if state == "cached"} == done
    Bundle.load(out).graph_paths()
    assert not partial.exists()


def test_kill_while_replacing_leaves_the_old_bundle(own_bundle: Path) -> None:
    before = (own_bundle / "manifest.json").read_bytes()
    partial = folders.partial_folder(own_bundle)
    command = [sys.executable, "-m", "gtr_deploy.export.cli", "build", "--model", "mar-digits", "--force"]
    process = subprocess.Popen([*command, "--out", str(own_bundle)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (partial / "graphs").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (own_bundle / "manifest.json").read_bytes() == before
    Bundle.load(own_bundle).graph_paths()
    with pytest.raises(BundleError):
        Bundle.load(partial)
    assert build(BuildRequest("mar-digits", own_bundle), QUIET).unchanged
    assert not partial.exists()


def test_failure_keeps_the_old_bundle(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise GtrError("no")

    before = (own_bundle / "manifest.json").read_bytes()
    monkeypatch.setattr(float_bundle, "_export", fail)
    with pytest.raises(GtrError, match="no"):
        build(BuildRequest("mar-digits", own_bundle, force=True), QUIET)
    assert (own_bundle / "manifest.json").read_bytes() == before
    Bundle.load(own_bundle).graph_paths()


@pytest.mark.parametrize("content", ["{", "[]", '{"backbone": 3}', '{"backbone": {"key": "x", "files": [{}]}}'])
def test_damaged_record_of_stages_only_costs_time(own_bundle: Path, content: str) -> None:
    partial = folders.partial_folder(own_bundle)
    partial.mkdir()
    (partial / "stages.json").write_text(content)
    result = build(BuildRequest("mar-digits", own_bundle, max_batch=3), QUIET)
    assert result.stages == _states(manifest="built")


class TestSwap:
    def test_interrupted_between_the_renames(self, tmp_path: Path) -> None:
        for _ in range(2):  # first the old folder comes back, then it goes
            aside = tmp_path / ".b.gtr-old"
            aside.mkdir()
            (aside / "stages.json").write_text("{}")
            folders.settle(tmp_path / "b")
            assert [path.name for path in tmp_path.iterdir()] == ["b"]

    def test_folders_of_others_stay(self, tmp_path: Path) -> None:
        for name in ("b", "b.old", ".b.gtr-old"):
            (tmp_path / name).mkdir()
        folders.settle(tmp_path / "b")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".b.gtr-old", "b", "b.old"]

    @pytest.mark.parametrize("atomic", [True, False])
    def test_replaces(self, tmp_path: Path, atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not atomic:
            monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: object())
        for name in ("new", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "which").write_text(name)
        folders.swap(tmp_path / "new", tmp_path / "b")
        assert (tmp_path / "b" / "which").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_default_folder_names() -> None:
    request = BuildRequest("mar-h", Path(), precision="fp16")
    assert default_out(request) == Path("bundles/mar-h-fp16")
    assert default_out(replace(request, random_weights=True)) == Path("bundles/mar-h-random-fp16")
    assert default_out(replace(request, own=OwnModel(decoder="none"))) == Path("bundles/mar-h-latents-fp16")


def test_hard_links_or_copies(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    result = build(BuildRequest("mar-digits", own_bundle, max_batch=5), QUIET)
    assert result.stages == _states(manifest="built")
    Bundle.load(own_bundle).graph_paths()


def test_a_new_version_of_a_graph_builds_it_again(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(float_bundle.STAGE_VERSIONS, "decoder", 99)
    request = BuildRequest("mar-digits", own_bundle)
    assert build(request, QUIET).stages == _states(manifest="built", decoder="built")
    assert build(request, QUIET).unchanged


def test_every_graph_has_a_version() -> None:
    assert set(float_bundle.STAGE_VERSIONS) == set(KINDS)
