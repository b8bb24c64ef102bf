"""What a checkpoint says of its model: every size that people have, and each way in which file and person disagree."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import ARCHITECTURES
from msgspec import structs

from gtr_deploy.export.build.checkpoints import expected_mar, load_mar
from gtr_deploy.export.build.inference import find
from gtr_deploy.export.build.own_model import findings
from gtr_deploy.export.build.told import Told, VaeFacts
from gtr_deploy.export.graphs.decoders import unpatched
from gtr_deploy.export.zoo import MODELS
from gtr_deploy.runtime.errors import GtrError, UsageError
from gtr_deploy.runtime.models.architecture import Decoder
from gtr_deploy.runtime.models.mar import KL16, MarArchitecture

OFFICIAL = Path(__file__).parents[1] / "data" / "mar_tiny_checkpoint-last.pth"
PIXELS = Decoder(kind="patches", stride=1)
SMALL = MarArchitecture(
    name="own",
    grid=(6, 10),
    token_channels=16,
    classes=37,
    buffer=5,
    width=32,
    depth=2,
    heads=4,
    head_depth=3,
    head_width=48,
    decoder=KL16,
)


def outline(architecture: MarArchitecture) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in expected_mar(architecture).items()}


def training_args(architecture: MarArchitecture, **changes: Any) -> Namespace:
    """As main_mar.py would have been called for a square image."""
    a, patch = architecture, architecture.decoder.patch
    values = {
        "model": "mar_own",
        "img_size": a.image_size[0],
        "vae_stride": a.decoder.stride,
        "vae_embed_dim": a.token_channels // patch**2,
        "patch_size": patch,
        "class_num": a.classes,
        "buffer_size": a.buffer,
        "diffloss_d": a.head_depth,
        "diffloss_w": a.head_width,
        "cfg": 1.0,
    }
    return Namespace(**{**values, **changes})


@pytest.mark.parametrize(("name", "original"), [("mar-b", "mar_base"), ("mar-l", "mar_large"), ("mar-h", "mar_huge")])
def test_the_published_files_need_no_option(name: str, original: str) -> None:
    known = ARCHITECTURES[name]
    found = find(outline(known), training_args(known, model=original), Told())
    assert found.architecture(name) == known
    assert found.origins["heads"] == f"args.model {original}"
    assert f"heads {known.heads} (args.model {original})" in found.summary


def test_the_training_command_of_the_original_readme() -> None:
    """--model mar_large --diffloss_d 3 --diffloss_w 1024: no published file has that head."""
    own = structs.replace(ARCHITECTURES["mar-l"], name="own", head_depth=3, head_width=1024)
    assert find(outline(own), training_args(own, model="mar_large"), Told()).architecture("own") == own


def test_the_recorded_official_file() -> None:
    found, taken, known = findings(OFFICIAL, Told(heads=4, patch_size=4))
    assert (taken, known) == ("model_ema", None)
    expected = structs.replace(
        SMALL, name="tiny", grid=(8, 8), classes=10, buffer=64, width=64, depth=2, head_depth=2, head_width=64,
        decoder=Decoder(kind="patches", stride=1, patch=4),
    )  # fmt: skip
    assert found.architecture("tiny") == expected
    load_mar(OFFICIAL, expected)


def test_a_vae_that_only_regroups_pixels_is_none() -> None:
    """mar-digits was trained with a "VAE" of stride 4 whose 16 channels are the pixels of a square."""
    digits = ARCHITECTURES["mar-digits"]
    args = training_args(digits, model="mar_digits", img_size=32, vae_stride=4, vae_embed_dim=16, patch_size=1)
    assert find(outline(digits), args, Told()).architecture("mar-digits") == digits
    shipped = MODELS["mar-digits"].shipped
    assert shipped is not None
    found, taken, known = findings(shipped, Told(heads=4, patch_size=4))
    assert (taken, known, found.architecture("mar-digits")) == ("state dict", "mar-digits", digits)


@given(
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    sizes=st.fixed_dictionaries(
        {
            "classes": st.integers(1, 1200),
            "buffer": st.integers(0, 256),
            "depth": st.integers(1, 3),
            "head_depth": st.integers(1, 3),
            "head_width": st.integers(1, 64),
        }
    ),
    heads=st.integers(1, 5),
    head_size=st.integers(1, 16),
    cell=st.tuples(st.integers(2, 16), st.integers(1, 4)),
)
@settings(deadline=None, max_examples=30)
def test_any_sizes_come_back(
    grid: tuple[int, int], sizes: Mapping[str, int], heads: int, head_size: int, cell: tuple[int, int]
) -> None:
    channels, patch = cell
    own = structs.replace(
        SMALL, grid=grid, heads=heads, width=heads * head_size, token_channels=channels * patch**2,
        decoder=structs.replace(KL16, patch=patch), **sizes,
    )  # fmt: skip
    vae = VaeFacts(channels, KL16.stride, scale=KL16.scale, shift=0.0)
    by_options = Told(heads, patch, grid, vae)
    assert find(outline(own), None, by_options).architecture("own") == own
    by_args = training_args(own, img_size=list(own.image_size))
    assert find(outline(own), by_args, Told(heads, vae=vae)).architecture("own") == own
    assert find(outline(own), vars(by_args), Told(heads, vae=vae)).architecture("own") == own


@pytest.mark.parametrize(
    ("grid", "args", "told", "options"),
    [
        ((8, 8), None, Told(), ["--heads", "--patch-size"]),
        ((8, 8), None, Told(heads=4), ["--patch-size"]),
        ((6, 10), Namespace(patch_size=1), Told(heads=4), ["--grid"]),
        ((6, 10), Namespace(model="mar_none"), Told(), ["--heads", "--patch-size", "--grid"]),
    ],
)
def test_what_nobody_says_is_asked_for(grid: tuple[int, int], args: Any, told: Told, options: list[str]) -> None:
    found = find(outline(structs.replace(SMALL, grid=grid)), args, told)
    with pytest.raises(UsageError) as caught:
        found.architecture("own")
    assert [option for option in ("--heads", "--patch-size", "--grid") if option in str(caught.value)] == options
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told", "text"),
    [
        ({"class_num": 10}, Told(), "classes 37 (tensors), 10 (args.class_num)"),
        ({"buffer_size": 64}, Told(), "buffer 5 (tensors), 64 (args.buffer_size)"),
        ({"diffloss_d": 6}, Told(), "head depth 3 (tensors), 6 (args.diffloss_d)"),
        ({"diffloss_w": 1024}, Told(), "head width 48 (tensors), 1024 (args.diffloss_w)"),
        ({"vae_embed_dim": 4}, Told(), "latent channels 4 (args.vae_embed_dim), 16 (16 token channels of 1x1 patches)"),
        ({"patch_size": 3}, Told(), "16 channels of a token (tensors), patches of 3x3 (args.patch_size)"),
        ({"model": "mar_base"}, Told(), "width 32 (tensors), 768 (args.model mar_base)"),
        ({"img_size": 256}, Told(), "tokens 64 (tensors), 256 (args.img_size 16x16)"),
        ({"img_size": 100}, Told(), "images of 100x100 (args.img_size), tokens of 16x16 pixels"),
        ({}, Told(patch_size=2), "patch 1 (args.patch_size), 2 (--patch-size)"),
        ({}, Told(grid=(4, 16)), "grid 8x8 (args.img_size), 4x16 (--grid)"),
        ({"img_size": None}, Told(grid=(4, 15)), "tokens 64 (tensors), 60 (--grid 4x15)"),
        ({"model": "mar_digits"}, Told(), "width 32 (tensors), 128 (args.model mar_digits)"),
    ],
)
def test_contradictions_show_both_values(changes: dict[str, Any], told: Told, text: str) -> None:
    own = structs.replace(SMALL, grid=(8, 8))
    with pytest.raises(GtrError) as caught:
        find(outline(own), training_args(own, **changes), told)
    assert str(caught.value) == f"contradicts: {text}"
    assert isinstance(caught.value, UsageError) == ("--" in text)  # who typed an option gets exit code 2


@pytest.mark.parametrize("value", [True, 2.0, "2", -1, 10**30, 1 << 17, [2], torch.zeros(2), {"a\n": 1}, "a\nb" * 999])
@pytest.mark.parametrize("argument", ["class_num", "patch_size", "img_size"])
def test_arguments_that_are_no_sizes(argument: str, value: Any) -> None:
    own = structs.replace(SMALL, grid=(8, 8))
    with pytest.raises(GtrError, match=rf"^has args\.{argument} .*, which is no size$") as caught:
        find(outline(own), training_args(own, **{argument: value}), Told())
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize("args", [3, "text", [1], Namespace(), {}, Namespace(model=3), {1: 2}])
def test_arguments_that_say_nothing(args: Any) -> None:
    own = structs.replace(SMALL, grid=(8, 8))
    assert find(outline(own), args, Told(heads=4, patch_size=1)).architecture("own") == own


def test_the_decoder_is_asked_for_where_nothing_says_it() -> None:
    own = structs.replace(SMALL, grid=(8, 8), decoder=structs.replace(KL16, stride=8))
    words = r"^does not say which decoder latents of 16 channels and stride 8 have \(--vae FILE, --decoder pixels or"
    with pytest.raises(UsageError, match=words):
        find(outline(own), training_args(own), Told(heads=4)).architecture("own")
    own = structs.replace(SMALL, grid=(8, 8), token_channels=4)
    with pytest.raises(UsageError, match="which decoder latents of 1 channels have"):
        find(outline(own), None, Told(heads=4, patch_size=2, decoder="vae")).architecture("own")
    own = structs.replace(SMALL, grid=(8, 8), token_channels=12)  # 3 channels: RGB, or those of a VQ model's VAE
    with pytest.raises(UsageError, match="which decoder latents of 3 channels have"):
        find(outline(own), None, Told(heads=4, patch_size=2)).architecture("own")


@pytest.mark.parametrize(
    ("channels", "args", "told", "patch"),
    [
        (4, {}, {"patch_size": 2}, 2),
        (4, {}, {"decoder": "pixels"}, 2),
        (16, {"vae_stride": 4, "vae_embed_dim": 16, "patch_size": 1}, {}, 4),
        (12, {}, {"decoder": "pixels"}, 2),
        (12, {"vae_stride": 1, "vae_embed_dim": 3, "patch_size": 2, "img_size": 16}, {}, 2),
        (12, {"vae_stride": 2, "vae_embed_dim": 12, "patch_size": 1}, {}, 2),
        (48, {"patch_size": 4}, {"decoder": "pixels"}, 4),
        (3, {}, {"decoder": "pixels"}, 1),
    ],
)
def test_squares_of_pixels(channels: int, args: dict[str, Any], told: dict[str, Any], patch: int) -> None:
    own = structs.replace(SMALL, grid=(8, 8), token_channels=channels, decoder=structs.replace(PIXELS, kind="none"))
    found = find(outline(own), args, Told(heads=4, **told)).architecture("own")
    assert found == structs.replace(own, decoder=structs.replace(PIXELS, patch=patch))
    assert found.image_size == (8 * patch, 8 * patch)
    assert f"{patch}x{patch} {'grey' if channels == patch**2 else 'RGB'} pixels" in found.decoding


@pytest.mark.parametrize(
    ("channels", "args", "words"),
    [
        (16, {"patch_size": 2}, "patch 2 .args.patch_size., 4 .16 token channels are 4x4 pixels.$"),
        (8, {}, "--decoder pixels: 8 channels of a token are neither p x p grey pixels nor 3 x p x p of RGB$"),
        (16, {"vae_stride": 3}, "contradicts: 4x4 pixels .16 token channels., a stride of 3$"),
        (16, {"vae_stride": 2, "patch_size": 2}, "has patches of 2x2 squares of 2x2 pixels each$"),
    ],
)
def test_what_is_no_square_of_pixels(channels: int, args: dict[str, Any], words: str) -> None:
    own = structs.replace(SMALL, grid=(8, 8), token_channels=channels, decoder=structs.replace(PIXELS, kind="none"))
    with pytest.raises(GtrError, match=words):
        find(outline(own), args, Told(heads=4, decoder="pixels"))


SD = VaeFacts(channels=4, stride=8, scale=0.18215, shift=0.0)
BARE = VaeFacts(channels=16, stride=8)


def test_the_patch_follows_from_the_vae() -> None:
    own = structs.replace(SMALL, grid=(8, 8), token_channels=16)
    found = find(outline(own), None, Told(heads=4, vae=SD))
    expected = Decoder(kind="kl", stride=8, patch=2, scale=0.18215)
    assert found.architecture("own") == structs.replace(own, decoder=expected)
    assert (found.origins["patch"], found.origins["scale"]) == ("16 token channels of --vae's 4", "config.json")
    odd = find(outline(own), None, Told(heads=4, vae=VaeFacts(16, 8, groups=8, scale=1.5, shift=0.1)))
    assert odd.architecture("own").decoder == Decoder(kind="kl", stride=8, scale=1.5, shift=0.1, groups=8)


def test_scale_and_shift_are_asked_for_where_nobody_says_them() -> None:
    own = structs.replace(SMALL, grid=(8, 8), token_channels=64)
    with pytest.raises(UsageError, match=r"\(--latent-scale X\), nor what was subtracted .*\(--latent-shift X, 0 for"):
        find(outline(own), None, Told(heads=4, vae=BARE)).architecture("own")
    found = find(outline(own), None, Told(heads=4, vae=BARE, scale=0.3611, shift=0.1159))
    assert found.architecture("own").decoder == Decoder(kind="kl", stride=8, patch=2, scale=0.3611, shift=0.1159)
    typed = find(outline(own), None, Told(heads=4, vae=SD, scale=0.2325))
    assert typed.architecture("own").decoder == Decoder(kind="kl", stride=8, patch=4, scale=0.2325)
    assert "scale 0.2325 (--latent-scale, not 0.18215 of config.json)" in typed.summary


@pytest.mark.parametrize(
    ("args", "told", "words"),
    [
        ({}, {}, "37 channels of a token .tensors., latents of 4 channels .--vae.: no patch of p x p cells"),
        ({"vae_stride": 16}, {"channels": 64}, "stride 16 .args.vae_stride., 8 .--vae.$"),
        ({"vae_embed_dim": 16}, {"channels": 64}, "latent channels 16 .args.vae_embed_dim., 4 .--vae.$"),
        ({}, {"channels": 64, "patch_size": 1}, "latent channels 64 .64 token channels of 1x1 patches., 4 .--vae.$"),
    ],
)
def test_a_vae_of_other_latents(args: dict[str, Any], told: dict[str, Any], words: str) -> None:
    own = structs.replace(SMALL, grid=(8, 8), token_channels=told.pop("channels", 37))
    with pytest.raises(UsageError, match=words):
        find(outline(own), args, Told(heads=4, vae=SD, **told))


def test_without_a_decoder_nothing_is_asked_about_it() -> None:
    own = structs.replace(SMALL, grid=(8, 8), token_channels=37)
    found = find(outline(own), None, Told(heads=4, decoder="none")).architecture("own")
    assert found == structs.replace(own, decoder=Decoder(kind="none", stride=1))
    known = {"vae_stride": 8, "patch_size": 2, "vae_embed_dim": 9}
    own = structs.replace(own, token_channels=36)
    found = find(outline(own), known, Told(heads=4, decoder="none")).architecture("own")
    assert found.decoder == Decoder(kind="none", stride=8, patch=2)


def test_what_cannot_be_a_model() -> None:
    state = outline(SMALL)
    found = find(state, None, Told(heads=5, patch_size=1, grid=(6, 10)))
    with pytest.raises(GtrError, match="width 32 is not a multiple of 5 heads"):
        found.architecture("own")
    for key, shape, text in (
        ("encoder_pos_embed_learned", (1, 59, 32), "buffer -1"),
        ("class_emb.weight", (10**9, 32), "classes 1000000000"),
        ("diffusion_pos_embed_learned", (1, 10**15, 32), "tokens 1000000000000000"),
    ):
        with pytest.raises(GtrError, match=f"cannot be a model of this family: {text}$"):
            find({**state, key: torch.empty(shape, device="meta")}, None, Told())
    with pytest.raises(GtrError, match="2 encoder blocks and 3 decoder blocks"):
        find({**state, "decoder_blocks.2.norm1.weight": state["fake_latent"]}, None, Told())


@pytest.mark.parametrize("value", [None, 3, torch.zeros(37), {"shape": 1}, Namespace(shape=2), Namespace(shape="ab")])
def test_what_is_no_mar(value: Any) -> None:
    with pytest.raises(GtrError, match=r"no class_emb\.weight of 2 axes; give the model's own checkpoint"):
        find({**outline(SMALL), "class_emb.weight": value}, None, Told())
    with pytest.raises(GtrError, match="this looks like the VAE, give it with --vae"):
        find({"decoder.conv_in.weight": torch.zeros(1)}, None, Told())


def test_shapes_must_fit_exactly(tmp_path: Path) -> None:
    state = {key: torch.zeros(1).expand(shape) for key, shape in expected_mar(SMALL).items()}
    state["decoder_embed.weight"] = torch.zeros(1).expand(64, 32)
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(GtrError, match=r"official layout: wrong: decoder_embed\.weight is 64x32, not 32x32$"):
        findings(tmp_path / "a.pth", Told())


def test_other_sizes_than_the_named_model_s_name_the_command(tmp_path: Path) -> None:
    state = {key: torch.zeros(1).expand(shape) for key, shape in expected_mar(SMALL).items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(GtrError, match=r"build it without --model: gtr-export build --checkpoint FILE$"):
        load_mar(tmp_path / "a.pth", ARCHITECTURES["mar-b"])
    del state["decoder_norm.weight"]
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(GtrError, match=r"check --model and --checkpoint$"):
        load_mar(tmp_path / "a.pth", ARCHITECTURES["mar-b"])


def test_patches_lie_as_the_original_s_unpatchify_puts_them() -> None:
    tokens = torch.randn(4, 6, 5 * 2 * 2)
    # models/mar.py: 'nhwcpq->nchpwq'
    expected = torch.einsum("nhwcpq->nchpwq", tokens.reshape(4, 2, 3, 5, 2, 2))
    assert torch.equal(unpatched(tokens, (2, 3), 2), expected.reshape(4, 5, 4, 6))
