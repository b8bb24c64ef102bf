"""Checkpoint files: official layouts, other people's layouts, the wrong model, damage, and code in disguise."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import ARCHITECTURES
from msgspec import structs
from safetensors.torch import save_file
from torch import Tensor

from gtr_deploy.export.build.checkpoints import (
    compare,
    expected_mar,
    load_mar,
    looks_like,
    random_mar,
)
from gtr_deploy.export.build.vae import expected_vae_decoder, load_vae_decoder
from gtr_deploy.runtime.errors import GtrError
from gtr_deploy.runtime.models.architecture import Architecture, Decoder
from gtr_deploy.runtime.models.mar import MarArchitecture

DATA = Path(__file__).parents[1] / "data"
OFFICIAL = DATA / "mar_tiny_checkpoint-last.pth"
TINY = MarArchitecture(
    name="mar-tiny",
    grid=(8, 8),
    token_channels=16,
    classes=10,
    buffer=64,
    width=64,
    depth=2,
    heads=4,
    head_depth=2,
    head_width=64,
    decoder=Decoder(kind="patches", stride=1, patch=4),
)


@pytest.fixture
def official() -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(OFFICIAL, weights_only=True)


def outline(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of the right shapes that take four bytes each, in memory and in a file."""
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


def refusal(path: Path, architecture: Architecture = TINY) -> str:
    with pytest.raises(GtrError) as caught:
        load_mar(path, architecture)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


class TestLoadMar:
    def test_official_file_gives_the_ema_weights(self, official: dict[str, Any]) -> None:
        state, found, _ = load_mar(OFFICIAL, TINY)
        assert found is not None
        assert (str(found), found.weights, found.key, found.prefix) == ("model_ema", "ema", "model_ema", "")
        assert list(state) == list(expected_mar(TINY))
        assert all(torch.equal(value, official["model_ema"][key]) for key, value in state.items())
        assert any(not torch.equal(value, official["model"][key]) for key, value in state.items())

    def test_without_ema_takes_the_model_and_says_so(self, official: dict[str, Any], tmp_path: Path) -> None:
        torch.save({"model": official["model"], "model_ema": None, "args": official["args"]}, tmp_path / "a.pth")
        state, found, _ = load_mar(tmp_path / "a.pth", TINY)
        assert str(found) == "model (no EMA weights in the file)"
        assert torch.equal(state["fake_latent"], official["model"]["fake_latent"])

    @pytest.mark.parametrize("zipped", [True, False])
    def test_plain_state_dict_in_both_torch_formats(
        self, official: dict[str, Any], tmp_path: Path, zipped: bool
    ) -> None:
        torch.save(official["model_ema"], tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
        state, found, _ = load_mar(tmp_path / "a.bin", TINY)
        assert found is not None
        assert (found.weights, found.key, found.prefix) == ("unknown", "", "")
        assert torch.equal(state["mask_token"], official["model_ema"]["mask_token"])

    def test_safetensors_under_any_name_in_its_own_dtype(self, official: dict[str, Any], tmp_path: Path) -> None:
        half = {key: value.half() for key, value in official["model_ema"].items()}
        save_file(half, tmp_path / "weights.pth")
        state, found, _ = load_mar(tmp_path / "weights.pth", TINY)
        assert found is not None
        assert found.weights == "unknown"
        assert {value.dtype for value in state.values()} == {torch.float16}

    def test_the_allowance_for_namespaces_does_not_outlive_the_call(self) -> None:
        load_mar(OFFICIAL, TINY)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(OFFICIAL, weights_only=True)


class TestCodeInACheckpoint:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize(
        ("name", "function"), [("os.system", os.system), ("builtins.eval", eval)], ids=["system", "eval"]
    )
    def test_is_refused_and_does_not_run(self, tmp_path: Path, name: str, function: Any, zipped: bool) -> None:
        marker = tmp_path / "marker"
        argument = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"

        class Trap:
            def __reduce__(self) -> tuple[Any, tuple[str]]:
                return function, (argument,)

        path = tmp_path / "a.pth"
        torch.save({"model_ema": Trap()}, path, _use_new_zipfile_serialization=zipped)
        assert f"holds Python code ({name})" in refusal(path)
        assert not marker.exists()
        with pytest.raises(GtrError, match="holds Python code"):
            load_vae_decoder(path, ARCHITECTURES["mar-b"])
        assert not marker.exists()
        # The trap is armed: the plain reader walks into it.
        torch.load(path, weights_only=False)
        assert marker.exists()

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_bare_pickles_are_refused_too(self, tmp_path: Path, protocol: int) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, tuple[str]]:
                return os.system, (f"touch {tmp_path / 'marker'}",)

        path = tmp_path / "a.pth"
        path.write_bytes(pickle.dumps({"model_ema": Trap()}, protocol=protocol))
        expected = {0: "is not a checkpoint", 2: "holds Python code (os.system)", 4: "opcode FRAME"}
        assert expected[protocol] in refusal(path)
        assert not (tmp_path / "marker").exists()

    def test_a_whole_module_is_refused(self, tmp_path: Path) -> None:
        torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
        assert "holds Python code (torch.nn.modules.linear.Linear)" in refusal(tmp_path / "a.pth")

    def test_an_object_that_is_built_from_an_allowed_class_only(self, tmp_path: Path) -> None:
        # BINPERSID, NEWOBJ and the like on the wrong kinds of things: refused by the reader, in one line here.
        path = tmp_path / "a.pth"
        path.write_bytes(b"\x80\x02}}b.")
        assert "more than tensors" in refusal(path)


class TestFilesThatAreNoCheckpoint:
    def test_missing(self, tmp_path: Path) -> None:
        assert "does not exist" in refusal(tmp_path / "a.pth")

    def test_folder(self, tmp_path: Path) -> None:
        assert "is a folder" in refusal(tmp_path)

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x")
        assert "cannot be read" in refusal(tmp_path / "a" / "b.pth")

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "a.pth").touch()
        assert "is empty (0 bytes)" in refusal(tmp_path / "a.pth")

    def test_web_page(self, tmp_path: Path) -> None:
        (tmp_path / "a.pth").write_text("\n <!doctype HTML><html></html>")
        assert "is a web page (HTML), not weights" in refusal(tmp_path / "a.pth")

    @pytest.mark.parametrize("kept", [10, 1000, 100_000])
    def test_truncated_archive(self, tmp_path: Path, kept: int) -> None:
        (tmp_path / "a.pth").write_bytes(OFFICIAL.read_bytes()[:kept])
        assert f"is cut short: {kept} bytes" in refusal(tmp_path / "a.pth")

    def test_archive_with_something_else_in_it(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros(3))
        assert "is damaged or not a checkpoint" in refusal(tmp_path / "a.npz")

    @pytest.mark.parametrize("kept", [3, 20, 100, 5000])
    def test_truncated_legacy_file(self, tmp_path: Path, kept: int, official: dict[str, Any]) -> None:
        path = tmp_path / "a.pth"
        torch.save(official["model_ema"], path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:kept])
        assert "is damaged or not a checkpoint" in refusal(path)

    def test_truncated_safetensors(self, tmp_path: Path, official: dict[str, Any]) -> None:
        path = tmp_path / "a.safetensors"
        save_file(dict(official["model_ema"]), path)
        path.write_bytes(path.read_bytes()[:50_000])
        assert "is a damaged .safetensors file" in refusal(path)

    def test_not_a_mapping(self, tmp_path: Path) -> None:
        torch.save([torch.zeros(1)], tmp_path / "a.pth")
        assert "holds a list, not a state dict" in refusal(tmp_path / "a.pth")


class TestWrongWeights:
    def test_names_a_few_and_counts_the_rest(self, official: dict[str, Any], tmp_path: Path) -> None:
        state = dict(official["model_ema"])
        for key in list(state)[:5]:
            state[f"part.{key}"] = state.pop(key)
        state["decoder_norm.weight"] = torch.zeros(65)
        torch.save(state, tmp_path / "a.pth")
        message = refusal(tmp_path / "a.pth")
        assert "does not hold the weights of mar-tiny" in message
        assert "missing " in message
        assert "unexpected part.fake_latent and 4 more" in message
        assert message.count("and 4 more") == 2
        assert "wrong: decoder_norm.weight is 65, not 64" in message
        assert message.endswith("check --model and --checkpoint")

    def test_another_model_of_the_zoo_is_recognised(self, tmp_path: Path) -> None:
        torch.save({"model_ema": outline(expected_mar(ARCHITECTURES["mar-b"]))}, tmp_path / "a.pth")
        message = refusal(tmp_path / "a.pth", ARCHITECTURES["mar-l"])
        assert "wrong: fake_latent is 1x768, not 1x1024 and " in message
        assert "this looks like mar-b, try --model mar-b" in message

    def test_the_same_sizes_with_a_fault_give_no_such_hint(self, tmp_path: Path) -> None:
        state = outline(expected_mar(ARCHITECTURES["mar-b"]))
        del state["fake_latent"]
        torch.save(state, tmp_path / "a.pth")
        message = refusal(tmp_path / "a.pth", ARCHITECTURES["mar-b"])
        assert message.endswith("missing fake_latent; check --model and --checkpoint")

    @pytest.mark.parametrize("name", list(ARCHITECTURES))
    def test_every_model_is_told_from_the_others(self, name: str) -> None:
        state = {key: torch.empty(shape, device="meta") for key, shape in expected_mar(ARCHITECTURES[name]).items()}
        assert looks_like(state) == name

    def test_an_unknown_mar_and_no_mar(self, official: dict[str, Any]) -> None:
        assert looks_like(official["model_ema"]) == "an unknown MAR"
        assert looks_like({"class_emb.weight": 3}) is None

    def test_a_vae_in_the_checkpoint_s_place(self, tmp_path: Path) -> None:
        torch.save({"model": outline(expected_vae_decoder(ARCHITECTURES["mar-b"]))}, tmp_path / "a.ckpt")
        assert "this looks like the VAE, give it with --vae" in refusal(tmp_path / "a.ckpt", ARCHITECTURES["mar-b"])

    @pytest.mark.parametrize(
        ("value", "complaint"),
        [
            (3, "x is a int, not a tensor"),
            (torch.zeros(()), "x is a scalar, not 2"),
            (torch.zeros(2, dtype=torch.int64), "x is torch.int64"),
            (torch.zeros(2, device="meta"), "on meta"),
            (torch.zeros(2).to_sparse(), "torch.sparse_coo"),
        ],
    )
    def test_entries_that_are_no_weights(self, value: Any, complaint: str) -> None:
        assert complaint in compare({"x": value}, {"x": (2,)})

    def test_keys_with_control_characters_stay_on_one_line(self) -> None:
        assert compare({"a\n\x1b[31mb": 1, 7: 2}, {}) == r"unexpected a\n\x1b[31mb, 7"

    def test_parameter_counts_of_the_published_models(self) -> None:
        counts = {"mar-b": 207_924_768, "mar-l": 478_326_304, "mar-h": 942_403_104}
        for name, count in counts.items():
            shapes = expected_mar(ARCHITECTURES[name]).values()
            assert sum(int(np.prod(shape)) for shape in shapes) == count


class TestRandomWeights:
    def test_same_seed_same_weights(self) -> None:
        first, again, other = random_mar(TINY, 1), random_mar(TINY, 1), random_mar(TINY, 2)
        assert not compare(first, expected_mar(TINY))
        assert all(torch.equal(value, again[key]) for key, value in first.items())
        assert not torch.equal(first["class_emb.weight"], other["class_emb.weight"])

    def test_a_key_s_values_do_not_depend_on_the_others(self) -> None:
        deeper = random_mar(structs.replace(TINY, depth=3, head_depth=4), 1)
        assert all(torch.equal(value, deeper[key]) for key, value in random_mar(TINY, 1).items())

    def test_scales(self) -> None:
        state = random_mar(structs.replace(TINY, width=256), 3)
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert torch.equal(state["z_proj_ln.weight"], torch.ones(256))
        assert torch.equal(state["encoder_blocks.0.attn.qkv.bias"], torch.zeros(768))
        deviations = {
            "encoder_blocks.0.attn.qkv.weight": 1 / 16,
            "class_emb.weight": 0.02,
            "decoder_pos_embed_learned": 0.02,
            "diffloss.net.time_embed.mlp.0.weight": 0.02,
            "diffloss.net.res_blocks.1.adaLN_modulation.1.weight": 0.02,
            "diffloss.net.final_layer.linear.weight": 0.02 / 8,
        }
        for key, deviation in deviations.items():
            assert float(state[key].std()) == pytest.approx(deviation, rel=0.1), key
