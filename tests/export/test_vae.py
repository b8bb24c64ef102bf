"""VAE files as people have them, against pictures that the originals decoded: MAR's KL-16, and diffusers' AutoencoderKL
in its own names (now and before), and in latent diffusion's."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import ARCHITECTURES
from msgspec import structs
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from vae_files import CASES, by_rule, write_vae

from gtr_deploy.export.build.checkpoints import compare
from gtr_deploy.export.build.told import VaeFacts
from gtr_deploy.export.build.vae import expected_vae_decoder, load_vae_decoder, random_vae_decoder, vae_facts
from gtr_deploy.export.graphs.decoders import LatentDecoder, build_decoder
from gtr_deploy.export.graphs.kl_decoder import KL16_LAYOUT, KlLayout, layout_of
from gtr_deploy.runtime.errors import GtrError
from gtr_deploy.runtime.models.architecture import Architecture, Decoder

DATA = Path(__file__).parents[1] / "data"
LAYOUTS = {
    "f8": KlLayout(4, (32, 32, 64, 64), blocks=3, inner_channels=4),
    "attention": KlLayout(3, (32, 64, 64), blocks=2, attention=(2,), inner_channels=3),
    "shift": KlLayout(16, (16, 32), blocks=2, groups=8),
}


def outline(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


def of_latents(latents: NDArray[np.float32], decoder: Decoder) -> Architecture:
    """A model whose latents [B, C, h, w] these are, in tokens of ``patch`` x ``patch`` cells."""
    _, channels, height, width = latents.shape
    grid, patch = (height // decoder.patch, width // decoder.patch), decoder.patch
    return structs.replace(ARCHITECTURES["mar-b"], grid=grid, token_channels=channels * patch**2, decoder=decoder)


def tokens_of(latents: NDArray[np.float32], patch: int) -> Tensor:
    """``patchify`` of models/mar.py: 'nchpwq->nhwcpq'."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return torch.from_numpy(cells.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch**2).copy())


def decoded(path: Path, latents: NDArray[np.float32], decoder: Decoder) -> NDArray[np.float32]:
    architecture = of_latents(latents, decoder)
    module = build_decoder(architecture, load_vae_decoder(path, architecture).weights)
    assert isinstance(module, LatentDecoder)
    module.load_state_dict(load_vae_decoder(path, architecture).weights)
    with torch.inference_mode():
        image, pixels = (
            module.image(tokens_of(latents, decoder.patch)).numpy(),
            module(tokens_of(latents, decoder.patch)),
        )
    plain = np.round(np.clip((image.astype(np.float64) + 1) / 2 * 255, 0, 255)).transpose(0, 2, 3, 1)
    assert np.abs(pixels.numpy() - plain).max() <= 1
    return image


def relative_error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


@pytest.mark.parametrize("layout", ["folder", "old .bin", "sharded", "ldm", "within"])
@pytest.mark.parametrize("case", CASES)
def test_pictures_that_diffusers_decoded(case: str, layout: str, tmp_path: Path) -> None:
    with np.load(DATA / "vae_diffusers.npz") as golden:
        latents, image = golden[f"{case}_latents"], golden[f"{case}_image"]
    config, path = CASES[case]["config"], write_vae(tmp_path, case, layout)
    scale, shift, groups = config["scaling_factor"], config["shift_factor"] or 0.0, config["norm_num_groups"]
    if layout in ("ldm", "within") and groups != 32:
        with pytest.raises(
            GtrError, match=r"^.{1,140} does not hold the VAE decoder: 16 channels are not those of 32 gro"
        ):
            vae_facts(path)
    else:
        facts, wanted = vae_facts(path), LAYOUTS[case]
        says = (None, None if case == "shift" else 0.0) if layout in ("ldm", "within") else (scale, shift)
        assert facts == VaeFacts(wanted.latent_channels, wanted.stride, groups, *says)
    decoder = Decoder(kind="kl", stride=LAYOUTS[case].stride, scale=scale, shift=shift, groups=groups)
    assert relative_error(decoded(path, latents, decoder), image) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_patches_of_latents(case: str, tmp_path: Path) -> None:
    """The same picture from tokens of 2 x 2 cells: MAR's own order, which is LightGen's, too."""
    with np.load(DATA / "vae_diffusers.npz") as golden:
        latents, image = golden[f"{case}_latents"], golden[f"{case}_image"]
    config, path = CASES[case]["config"], write_vae(tmp_path, case, "folder")
    latents = np.concatenate([latents, latents[:, :, :1]], axis=2)  # 4 x 4 cells
    decoder = Decoder(
        kind="kl", stride=LAYOUTS[case].stride, patch=1, scale=config["scaling_factor"],
        shift=config["shift_factor"] or 0.0, groups=config["norm_num_groups"],
    )  # fmt: skip
    plain = decoded(path, latents, decoder)
    assert relative_error(decoded(path, latents, structs.replace(decoder, patch=2)), plain) <= 1e-5
    assert plain.shape[2] == image.shape[2] // 3 * 4


def test_the_picture_of_stable_diffusion_3(tmp_path: Path) -> None:
    """The whole decoder of SD3.5, FLUX's sizes: 16 channels with a shift, no post_quant_conv; 2 x 2 patches."""
    record = json.loads((DATA / "vae_sd3.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **record["config"]}))
    keys = {key: shape for key, shape in record["keys"].items() if key.startswith("decoder.")}
    save_file(by_rule(keys), tmp_path / "diffusion_pytorch_model.safetensors")
    assert vae_facts(tmp_path) == VaeFacts(16, 8, 32, 1.5305, 0.0609)
    with np.load(DATA / "vae_sd3.npz") as golden:
        latents, image = golden["latents"], golden["image"]
    decoder = Decoder(kind="kl", stride=8, patch=2, scale=1.5305, shift=0.0609)
    assert relative_error(decoded(tmp_path, latents, decoder), image) <= 1e-5


def test_the_picture_of_kl16(tmp_path: Path) -> None:
    record = json.loads((DATA / "vae_kl16.json").read_text())
    # The encoder's weights are not read: four bytes each will do.
    unused = outline({key: tuple(shape) for key, shape in record["keys"].items()})
    used = {key: shape for key, shape in record["keys"].items() if key.startswith(("decoder.", "post_quant_conv."))}
    torch.save({"model": {**unused, **by_rule(used)}}, tmp_path / "kl16.ckpt")
    assert vae_facts(tmp_path / "kl16.ckpt") == VaeFacts(16, 16, shift=0.0, kl16=True)
    with np.load(DATA / "vae_kl16.npz") as golden:
        latents, recorded, pixels = golden["latents"], golden["image"].astype(np.float32), golden["pixels"]
    image = decoded(tmp_path / "kl16.ckpt", latents, ARCHITECTURES["mar-b"].decoder)
    assert relative_error(image, recorded) <= 1e-3  # recorded in float16
    difference = np.abs(np.round(np.clip((image + 1) / 2 * 255, 0, 255)) - pixels)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "plain", "safetensors"])
def test_wrappers(tmp_path: Path, wrapper: str) -> None:
    architecture = ARCHITECTURES["mar-b"]
    state = {key: torch.zeros(shape).half() for key, shape in expected_vae_decoder(architecture).items()}
    rest = {key: torch.zeros(2) for key in ("encoder.a", "quant_conv.weight", "loss.b", "model_ema.decay")}
    path = tmp_path / "vae"
    if wrapper == "safetensors":
        save_file({**state, **rest}, path)
    else:
        torch.save({**state, **rest} if wrapper == "plain" else {wrapper: {**state, **rest}}, path)
    assert load_vae_decoder(path, architecture).weights.keys() == expected_vae_decoder(architecture).keys()


def test_a_model_without_vae_reads_nothing() -> None:
    for architecture in (
        ARCHITECTURES["mar-digits"],
        of_latents(np.zeros((1, 4, 8, 8)), Decoder(kind="none", stride=8)),
    ):
        assert load_vae_decoder(Path("/nowhere"), architecture).weights == {}
        assert random_vae_decoder(architecture, 0) == {}


def test_random_weights_are_kl16_s() -> None:
    state = random_vae_decoder(ARCHITECTURES["mar-b"], 0)
    assert not compare(state, expected_vae_decoder(ARCHITECTURES["mar-b"]))
    assert layout_of(state) == KL16_LAYOUT
    assert float(state["decoder.conv_out.weight"].std()) == pytest.approx((128 * 9) ** -0.5, rel=0.1)


# What people can get wrong, and what a hostile file may say.

MISSING = "decoder.up_blocks.1.resnets.0.conv1.weight"


def _changed(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda config, state: config.update(changes)


def _without(*keys: str) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda config, state: [state.pop(key) for key in keys]


def _with(key: str, *shape: int) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda config, state: state.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            _changed(_class_name="AutoencoderDC"),
            "config.json is of AutoencoderDC; this version decodes with an Auto",
        ),
        (_changed(_class_name=""), "config.json is without a _class_name"),
        (_changed(_class_name="a\n\x1b[31mb"), r"is of a\n\x1b[31mb; this"),
        (_changed(scaling_factor="0.18"), "(Expected `float | null`, got `str` - at `$.scaling_factor`); download"),
        (_changed(scaling_factor=0), "is not one of an AutoencoderKL (Expected `float` > 0.0"),
        (_changed(scaling_factor=float("nan")), "is not one of an AutoencoderKL (Expected `float`"),
        (_changed(scaling_factor=10**300), "is not one of an AutoencoderKL (Expected `float` <= 1000000.0"),
        (_changed(shift_factor=float("-inf")), "is not one of an AutoencoderKL (Expected `float` >= -1000000.0"),
        (_changed(norm_num_groups=0), "is not one of an AutoencoderKL (Expected `int` >= 1"),
        (_changed(norm_num_groups=10**30), "is not one of an AutoencoderKL"),
        (
            _changed(norm_num_groups=24),
            "does not hold the VAE decoder: 32 channels are not those of 24 groups (GroupNorm)",
        ),
        (_changed(block_out_channels=[1] * 1000), "is not one of an AutoencoderKL (Expected `array` of length <= 16"),
        (
            _changed(block_out_channels=[8, 8, 8, 8]),
            "contradicts: block_out_channels (8, 8, 8, 8) (config.json), (32, 32, 64",
        ),
        (_changed(latent_channels=16), "contradicts: latent_channels 16 (config.json), 4 (tensors)"),
        (_changed(act_fn="relu"), "has act_fn relu, which no decoder of this version does"),
        (_changed(latents_mean=[0.0] * 4), "has latents_mean and latents_std, which no decoder of this version does"),
        (_without("decoder.conv_in.weight"), "does not hold the VAE decoder: no decoder.conv_in.weight of 4 axes"),
        (_with("decoder.conv_in.weight", 64), "no decoder.conv_in.weight of 4 axes"),
        (_with("decoder.conv_in.weight", 0, 0, 3, 3), "latents of 4 channels, 0 inside"),
        (_without(MISSING), "missing decoder.up.2.block.0.conv1.weight (in latent diffusion's names); give the VAE"),
        (_with("decoder.conv_out.weight", 1, 32, 3, 3), "wrong: decoder.conv_out.weight is 1x32x3x3, not 3x32x3x3"),
        (_with("quantize.embedding.weight", 8, 4), "unexpected quantize.embedding.weight"),
        (lambda config, state: state.update({3: torch.zeros(1)}), "unexpected 3"),
        (lambda config, state: state.update({MISSING: Namespace(shape=(1, 2))}), "is a Namespace, not a tensor"),
        (
            lambda config, state: state.update({"decoder.conv_in.weight": Namespace(shape=5)}),
            "no decoder.conv_in.weight of",
        ),
        (_with("decoder.up_blocks.7.resnets.0.conv1.weight", 8), "does not hold the VAE decoder"),
        (
            _with("decoder.mid_block.attentions.0.query.weight", 64, 64),
            "holds decoder.mid.attn_1.q.weight under two names",
        ),
        (_with("decoder.up.0.block.0.conv1.weight", 4), "holds decoder.up.0.block.0.conv1.weight under two names"),
    ],
)
def test_folders_that_are_refused(
    spoil: Callable[[dict[str, Any], dict[str, Tensor]], Any], words: str, tmp_path: Path
) -> None:
    config, state = dict(CASES["f8"]["config"]), outline(CASES["f8"]["keys"])
    spoil(config, state)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    architecture = of_latents(np.zeros((1, 4, 8, 8)), Decoder(kind="kl", stride=8))
    with pytest.raises(GtrError) as caught:
        load_vae_decoder(tmp_path, architecture)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 300
    assert words in message.replace(" of mar-b:", ":")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}.",
        b"[]",
        b"null",
        b"{",
        b'{"a": 1, "a": 1}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xff",
    ],
)
def test_configurations_that_are_none(content: bytes, tmp_path: Path) -> None:
    path = write_vae(tmp_path, "f8", "folder")
    (path / "config.json").write_bytes(content)
    with pytest.raises(GtrError, match=r"config\.json is not a JSON object \(.*\); download it again$") as caught:
        vae_facts(path)
    assert str(caught.value).isprintable()


def test_a_configuration_that_is_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    path = write_vae(tmp_path / "vae", "f8", "folder")
    (path / "config.json").rename(tmp_path / "config.json")
    assert vae_facts(path).scale is None  # no config.json is like one without scaling_factor
    (path / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(GtrError, match=r"config\.json is a link out of the folder"):
        vae_facts(path)


def test_another_model_s_configuration_in_the_folder_of_one_file_says_nothing(tmp_path: Path) -> None:
    path = write_vae(tmp_path, "f8", "ldm")
    (tmp_path / "config.json").write_text('{"architectures": ["Bert"], "act_fn": 3}')
    assert vae_facts(path).scale is None


@pytest.mark.parametrize(
    ("decoder", "channels", "words"),
    [
        (Decoder(kind="kl", stride=16), 4, "has a stride of 8 pixels, mar-b needs 16; give another --vae"),
        (Decoder(kind="kl", stride=8), 16, "has latents of 4 channels, mar-b needs 16; give another --vae"),
        (Decoder(kind="kl", stride=8, groups=16), 4, "has GroupNorms of 32 groups, mar-b needs 16; give another --vae"),
    ],
)
def test_a_vae_of_other_latents_than_the_model_s(decoder: Decoder, channels: int, words: str, tmp_path: Path) -> None:
    path = write_vae(tmp_path, "f8", "folder")
    with pytest.raises(GtrError, match=re.escape(words)):
        load_vae_decoder(path, of_latents(np.zeros((1, channels, 8, 8), np.float32), decoder))


def test_faults_are_named(tmp_path: Path) -> None:
    state = outline(expected_vae_decoder(ARCHITECTURES["mar-b"]))
    state["decoder.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(GtrError, match=r"unexpected decoder\.extra; give the VAE that the model was trained with$"):
        load_vae_decoder(tmp_path / "a.ckpt", ARCHITECTURES["mar-b"])


def test_a_mar_in_the_vae_s_place() -> None:
    for read in (vae_facts, lambda path: load_vae_decoder(path, ARCHITECTURES["mar-b"])):
        with pytest.raises(GtrError, match="this looks like a MAR checkpoint, give it with --checkpoint"):
            read(DATA / "mar_tiny_checkpoint-last.pth")
