"""Checkpoints as people have them: wrapped, prefixed, in shards, young, and what only looks like weights."""

from __future__ import annotations

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import ARCHITECTURES
from safetensors.torch import save_file
from test_checkpoints import TINY, outline
from torch import Tensor

from gtr_deploy.export.build.checkpoints import load_mar, random_mar
from gtr_deploy.export.build.digests import file_sha256, known_file, weights_sha256
from gtr_deploy.export.build.reading import read_checkpoint
from gtr_deploy.export.build.request import BuildRequest
from gtr_deploy.export.build.sources import resolve_weights
from gtr_deploy.export.build.state_dicts import StateDict, find_state_dicts, movement
from gtr_deploy.export.build.vae import expected_vae_decoder, load_vae_decoder
from gtr_deploy.export.zoo import KL16, MAR_B_SHA256, published
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import GtrError

Make = Callable[[Any, Any], dict[str, Any]]
MODEL, EMA = random_mar(TINY, 1), random_mar(TINY, 2)


def prefixed(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


WRAPPED: dict[str, tuple[Make, str, str, str]] = {
    "official": (lambda m, e: {"model": m, "model_ema": e}, "ema", "model_ema", ""),
    "dit": (lambda m, e: {"model": m, "ema": e, "opt": {}}, "ema", "ema", ""),
    "basicsr": (lambda m, e: {"params": m, "params_ema": e}, "ema", "params_ema", ""),
    "nested": (lambda m, e: {"state_dict": {"model": m, "model_ema": e}}, "ema", "state_dict.model_ema", ""),
    "average-in-an-average": (lambda m, e: {"ema": {"module": e}, "model": m}, "ema", "ema.module", ""),
    "prefixed": (lambda m, e: {"model": m, "model_ema": prefixed("module.", e)}, "ema", "model_ema", "module."),
    "in-one-mapping": (
        lambda m, e: {"state_dict": {**prefixed("model.", m), **prefixed("ema_model.module.", e)}},
        "ema",
        "state_dict",
        "ema_model.module.",
    ),
    "in-one-average": (
        lambda m, e: {"ema": {"step": torch.ones(1), **prefixed("model.", m), **prefixed("ema_model.", e)}},
        "ema",
        "ema",
        "ema_model.",
    ),
    "beside-a-vae": (
        lambda m, e: {"state_dict": {**prefixed("model.", e), "vae.decoder.weight": torch.ones(2)}},
        "unknown",
        "state_dict",
        "model.",
    ),
    "empty-ema": (lambda m, e: {"model": e, "model_ema": {}}, "model", "model", ""),
    "decay-of-an-ema": (lambda m, e: {"model": e, "ema": {"decay": 0.999}}, "model", "model", ""),
    "ddp": (lambda m, e: {"model": prefixed("module.", e)}, "model", "model", "module."),
    "compiled": (lambda m, e: {"model": prefixed("_orig_mod.", e)}, "model", "model", "_orig_mod."),
    "both": (lambda m, e: {"model": prefixed("module._orig_mod.", e)}, "model", "model", "module._orig_mod."),
    "deepspeed": (lambda m, e: {"module": e, "ds_version": "0.15"}, "model", "module", ""),
    "lightning": (lambda m, e: {"state_dict": e, "epoch": 1}, "unknown", "state_dict", ""),
    "bare": (lambda m, e: e, "unknown", "", ""),
    "bare-ddp": (lambda m, e: prefixed("module.", e), "unknown", "", "module."),
}
"""Name to what makes the file's content so that the second state dict is the one to take, and how it is found."""


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers(name: str, tmp_path: Path) -> None:
    make, *expected = WRAPPED[name]
    torch.save(make(MODEL, EMA), tmp_path / "a.pth")
    weights, found, _ = load_mar(tmp_path / "a.pth", TINY)
    assert found is not None
    assert [found.weights, found.key, found.prefix] == expected
    assert all(torch.equal(value, EMA[key]) for key, value in weights.items())


@pytest.mark.parametrize("name", ["official", "nested", "in-one-mapping", "prefixed", "in-one-average"])
def test_the_model_s_own_are_taken_when_asked_for(name: str, tmp_path: Path) -> None:
    torch.save(WRAPPED[name][0](MODEL, EMA), tmp_path / "a.pth")
    weights, found, _ = load_mar(tmp_path / "a.pth", TINY, "model")
    assert found is not None
    assert found.weights == "model"
    assert "its EMA weights are left out" in str(found)
    assert torch.equal(weights["class_emb.weight"], MODEL["class_emb.weight"])


@pytest.mark.parametrize("name", ["ddp", "deepspeed", "lightning", "bare", "empty-ema"])
def test_ema_is_not_made_up(name: str, tmp_path: Path) -> None:
    torch.save(WRAPPED[name][0](MODEL, EMA), tmp_path / "a.pth")
    with pytest.raises(GtrError, match="does not say that it holds EMA weights"):
        load_mar(tmp_path / "a.pth", TINY, "ema")


def test_model_is_not_made_up(tmp_path: Path) -> None:
    torch.save({"model_ema": EMA}, tmp_path / "a.pth")
    with pytest.raises(GtrError, match="holds EMA weights and no others"):
        load_mar(tmp_path / "a.pth", TINY, "model")


def test_a_wrong_ema_is_not_passed_over(tmp_path: Path) -> None:
    torch.save({"model": MODEL, "model_ema": {"other": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(GtrError, match="does not hold the weights of mar-tiny"):
        load_mar(tmp_path / "a.pth", TINY)


def test_wrappers_end_somewhere() -> None:
    inner: dict[str, Any] = dict(EMA)
    for _ in range(4):
        inner = {"state_dict": inner}
    assert find_state_dicts(inner, EMA) == [StateDict(inner)]
    itself: dict[str, Any] = {}
    itself |= dict.fromkeys(("model", "ema", "state_dict", "module"), itself)
    assert find_state_dicts(itself, EMA) == [StateDict(itself)]


@pytest.mark.parametrize("key", ["module", "ema.module", "state_dict", "params_ema"])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_the_vae_in_wrappers(key: str, prefix: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES["mar-b"]
    content: dict[str, Any] = prefixed(prefix, outline(expected_vae_decoder(architecture)))
    content[f"{prefix}encoder.a"] = torch.zeros(1)
    for part in reversed(key.split(".")):
        content = {part: content}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(GtrError, match="lie upon each other"):  # found, and then looked at
        load_vae_decoder(tmp_path / "a.ckpt", architecture)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_in_both_formats(zipped: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {f"module.{key}": value.to(dtype) for key, value in EMA.items()}
    torch.save({"state_dict": {"ema": state}}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    weights = load_mar(tmp_path / "a.pth", TINY).weights
    assert {value.dtype for value in weights.values()} == {dtype}


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_and_paths_beside_the_weights_are_values(zipped: bool, tmp_path: Path) -> None:
    beside = {
        "f8": np.float64(3.5), "f4": np.float32(-0.25), "f2": np.float16(2), "i8": np.int64(-(2**60)),
        "u1": np.uint8(255), "b1": np.bool_(True), "again": np.float64(1e300), "path": Path("/a/b"), "none": Path(),
    }  # fmt: skip
    arguments = Namespace(output_dir=Path("out"), lr=np.float64(1e-4))
    torch.save({**beside, "args": arguments}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    content = read_checkpoint(tmp_path / "a.pth")
    assert {key: content[key] for key in beside if key not in ("path", "none")} == {
        key: value.item() for key, value in beside.items() if isinstance(value, np.generic)
    }
    assert (str(content["path"]), str(content["none"]), str(content["args"].output_dir)) == ("/a/b", ".", "out")
    assert not isinstance(content["path"], Path), "a pure path, which opens nothing"
    assert type(content["args"].lr) is float


class TestYoungEma:
    @staticmethod
    def trained(seed: int, amount: float = 0.1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        begin = random_mar(TINY, 0)
        return {key: value + amount * torch.randn(value.shape, generator=generator) for key, value in begin.items()}

    @pytest.mark.parametrize(("share", "warned"), [(0.0, True), (0.4, True), (0.6, False), (1.0, False)])
    def test_is_told_by_how_far_it_has_moved(self, share: float, warned: bool, tmp_path: Path) -> None:
        begin, model = random_mar(TINY, 0), self.trained(1)
        ema = {key: value + share * (model[key] - value) for key, value in begin.items()}
        assert movement(ema, model) == pytest.approx(share)
        torch.save({"model": model, "model_ema": ema}, tmp_path / "a.pth")
        warning = load_mar(tmp_path / "a.pth", TINY).warning
        assert warning.startswith("warning: model_ema is hardly trained: ") == warned
        assert bool(warning) == warned
        assert not load_mar(tmp_path / "a.pth", TINY, "model").warning

    def test_two_beginnings_say_nothing(self, tmp_path: Path) -> None:
        assert movement(EMA, MODEL) is None
        torch.save({"model": MODEL, "model_ema": EMA}, tmp_path / "a.pth")
        assert not load_mar(tmp_path / "a.pth", TINY).warning

    def test_a_model_that_cannot_be_one_is_not_measured(self, tmp_path: Path) -> None:
        torch.save({"model": {"class_emb.weight": torch.ones(3)}, "model_ema": EMA}, tmp_path / "a.pth")
        assert not load_mar(tmp_path / "a.pth", TINY).warning


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir()
        keys, listed = list(EMA), {}
        for number, part in enumerate((keys[:20], keys[20:])):
            save_file({key: EMA[key] for key in part}, folder / f"{number}.safetensors")
            listed |= dict.fromkeys(part, f"{number}.safetensors")
        self.write(folder, listed)
        return folder

    @staticmethod
    def index(folder: Path) -> Path:
        return folder / "model.safetensors.index.json"

    @classmethod
    def listed(cls, folder: Path) -> dict[str, str]:
        return json.loads(cls.index(folder).read_text())["weight_map"]

    @classmethod
    def write(cls, folder: Path, listed: Any) -> None:
        cls.index(folder).write_text(json.dumps({"metadata": {}, "weight_map": listed}))

    @staticmethod
    def refused(path: Path, words: str) -> None:
        with pytest.raises(GtrError, match=words) as caught:
            load_mar(path, TINY)
        assert len(str(caught.value)) <= 300
        assert str(caught.value).isprintable()

    def test_folder_and_index(self, folder: Path) -> None:
        for path in (folder, self.index(folder)):
            weights, found, _ = load_mar(path, TINY)
            assert found is not None
            assert found.weights == "unknown"
            assert all(torch.equal(value, EMA[key]) for key, value in weights.items())

    def test_a_folder_of_one_file(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "is a folder without .safetensors weights")
        save_file(EMA, tmp_path / "b.safetensors")
        assert load_mar(tmp_path, TINY).weights.keys() == EMA.keys()
        save_file(EMA, tmp_path / "a.safetensors")
        self.refused(tmp_path, "is a folder with 2 sets of weights: a.safetensors, b.safetensors; give one of them")

    def test_digest(self, folder: Path) -> None:
        files = [self.index(folder), folder / "0.safetensors", folder / "1.safetensors"]
        lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
        digest = weights_sha256(files[0])
        assert digest == hashlib.sha256(lines.encode()).hexdigest()
        assert known_file(digest) == files[0]
        assert weights_sha256(files[1]) == file_sha256(files[1])
        os.utime(files[2], (1, 1))
        files[2].write_bytes(files[2].read_bytes() + b"x")
        assert weights_sha256(files[0]) != digest
        assert known_file(digest) is None

    @pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/0.safetensors", "..", "", "a\\b", "\0"])
    def test_names_outside_the_folder(self, folder: Path, name: str) -> None:
        save_file(EMA, folder.parent / "x.safetensors")
        self.write(folder, dict.fromkeys(EMA, name))
        self.refused(folder, "is not beside it; shards lie in the folder of their index")

    def test_links_out_and_in(self, folder: Path) -> None:
        shard, other = folder / "1.safetensors", folder.parent / "x.safetensors"
        shard.rename(other)
        shard.symlink_to(other)
        self.refused(folder, "1.safetensors is a link out of the folder")
        shard.unlink()
        other.rename(folder / "x.safetensors")
        shard.symlink_to("x.safetensors")
        load_mar(folder, TINY)

    def test_the_cache_of_hugging_face(self, folder: Path) -> None:
        snapshot, blobs = folder.parent / "m/snapshots/1", folder.parent / "m/blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for path in folder.iterdir():
            path.rename(blobs / f"{path.name}0")
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}0")
        assert load_mar(snapshot, TINY).weights.keys() == EMA.keys()

    def test_tensors_missing_unlisted_and_twice(self, folder: Path) -> None:
        listed = self.listed(folder)
        first, *_, last = listed
        (folder / "1.safetensors").rename(folder / "2.safetensors")
        self.refused(folder, "names 1.safetensors, which is missing")
        (folder / "2.safetensors").rename(folder / "1.safetensors")
        self.write(folder, {**listed, "more": "1.safetensors"})
        self.refused(folder, "lacks more, which its index lists")
        self.write(folder, {key: name for key, name in listed.items() if key != last})
        self.refused(folder, f"holds {last}, which its index does not list")
        save_file(
            {key: EMA[key] for key, name in listed.items() if name[0] == "1" or key == first}, folder / "1.safetensors"
        )
        self.write(folder, listed)
        self.refused(folder, f"holds {first}, which another shard holds, too")

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 10**5,
         '{"weight_map": {"a": "x", "a": "y"}}', "\udc80", '{"weight_map": {' + ", ".join(
             f'"{n}": "a"' for n in range(20_001)) + "}}", " " * 5_000_000,
         '{"weight_map": {' + ", ".join(f'"{n}": "{n}.safetensors"' for n in range(1001)) + "}}"],
        ids=range(13),
    )  # fmt: skip
    def test_indices_that_are_none(self, folder: Path, content: str) -> None:
        self.index(folder).write_bytes(content.encode("utf-8", "surrogateescape"))
        self.refused(folder, "is not an index of shards" if content else "is empty")

    def test_shards_that_are_none(self, folder: Path) -> None:
        (folder / "1.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 9\n")
        self.refused(folder, "1.safetensors is a Git LFS pointer")
        (folder / "1.safetensors").unlink()
        os.mkfifo(folder / "1.safetensors")
        self.refused(folder, "names 1.safetensors, which is missing")


@pytest.mark.parametrize("start", ["version https://git-lfs.github.com/spec/v1\n", "<html>", "\ufeff\n<!DOCTYPE html>"])
def test_what_is_no_weights(start: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text(start)
    words = "is a Git LFS pointer" if start.startswith("v") else "is a web page"
    with pytest.raises(GtrError, match=words):
        load_mar(tmp_path / "a.pth", TINY)
    with pytest.raises(GtrError, match=words):
        load_vae_decoder(tmp_path / "a.pth", ARCHITECTURES["mar-b"])


def test_what_is_no_vae_shows_before_the_long_part(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("<html>")
    request = BuildRequest("mar-b", tmp_path / "b", vae=tmp_path / "a.ckpt", random_weights=True)
    with pytest.raises(GtrError, match="is a web page"):
        resolve_weights(request, Reporter(quiet=True))


def test_published_files_are_named_and_not_required() -> None:
    assert KL16.sha256 is not None
    assert published("mar-b", "checkpoint", MAR_B_SHA256) == "the published mar-b checkpoint"
    assert published("mine", "checkpoint", MAR_B_SHA256) == "the published mar-b checkpoint"
    assert published("mar-b", "checkpoint", "0" * 64) == "not the published file"
    assert published("mar-h", "vae", KL16.sha256) == "the published KL-16 VAE"
    assert published("mar-h", "checkpoint", "0" * 64) == "", "nobody has published its digest"
    assert published("mine", "vae", "0" * 64) == ""
