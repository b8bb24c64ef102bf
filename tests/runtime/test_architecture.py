"""The model sections of a manifest are read strictly; sizes agree with the published models."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import torch
from jobs import ARCHITECTURES

from gtr_deploy.export.graphs.backbone import Backbone
from gtr_deploy.export.graphs.diffusion_head import DiffusionHead, Modulation
from gtr_deploy.runtime.models.architecture import Architecture, Decoder
from gtr_deploy.runtime.models.conditioning import Conditioner
from gtr_deploy.runtime.models.families import FAMILIES, decode_model, graph_specs, known_models

NAMES = {"class_names": ["one", "two", "three", "four", "five"]}


def valid() -> dict[str, Any]:
    return {
        "family": "mar",
        "name": "mine",
        "grid": [6, 10],
        "token_channels": 16,
        "classes": 5,
        "buffer": 8,
        "width": 96,
        "depth": 2,
        "heads": 4,
        "head_depth": 3,
        "head_width": 128,
        "decoder": {"kind": "kl", "stride": 16, "patch": 1, "scale": 0.2325, "shift": 0.0},
    }


def decoded(model: Any, conditioning: Any = NAMES) -> tuple[Architecture, Conditioner]:
    return decode_model(msgspec.Raw(json.dumps(model).encode()), msgspec.Raw(json.dumps(conditioning).encode()))


@pytest.mark.parametrize(
    ("name", "total", "encoder", "head"),
    [
        ("mar-b", 207_924_768, 85.1, 35.7),
        ("mar-l", 478_326_304, 201.5, 72.2),
        ("mar-h", 942_403_104, 393.6, 151.2),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, total: int, encoder: float, head: float) -> None:
    with torch.device("meta"):
        backbone = Backbone(ARCHITECTURES[name])
        diffusion_head = torch.nn.ModuleList([DiffusionHead(ARCHITECTURES[name]), Modulation(ARCHITECTURES[name])])

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(backbone) + count(diffusion_head) == total
    assert FAMILIES["mar"].parameters(ARCHITECTURES[name]) == total
    assert count(backbone.encoder_blocks) == count(backbone.decoder_blocks)
    assert count(backbone.encoder_blocks) / 1e6 == pytest.approx(encoder, abs=0.1)
    assert count(diffusion_head) / 1e6 == pytest.approx(head, abs=0.1)


@pytest.mark.parametrize("name", known_models())
def test_round_trip(name: str) -> None:
    model = known_models()[name]
    assert model.architecture.name == name
    found = decode_model(*(msgspec.Raw(msgspec.json.encode(part)) for part in (model.architecture, model.conditioner)))
    assert found == (model.architecture, model.conditioner)


def test_derived_sizes() -> None:
    architecture, _ = decoded(valid())
    assert architecture.family == "mar"
    assert architecture.grid == (6, 10)
    assert architecture.tokens == 60
    assert architecture.image_size == (96, 160)
    patches = Decoder(kind="patches", stride=1, patch=3)
    assert msgspec.structs.replace(architecture, decoder=patches, token_channels=9).image_size == (18, 30)
    assert ARCHITECTURES["mar-h"].image_size == (256, 256)
    assert ARCHITECTURES["mar-digits"].image_size == (32, 32)


@pytest.mark.parametrize(
    ("decoder", "channels", "text"),
    [
        (Decoder(kind="patches", stride=1, patch=4), 16, "4x4 grey pixels a token; pictures of 24x40"),
        (Decoder(kind="patches", stride=1, patch=2), 12, "2x2 RGB pixels a token; pictures of 12x20"),
        (
            Decoder(kind="kl", stride=8, patch=2, scale=1.5305, shift=0.0609),
            64,
            "KL autoencoder, 16 channels, stride 8, patch 2, scale 1.5305, shift 0.0609; pictures of 96x160",
        ),
        (Decoder(kind="none", stride=1), 7, "none; latents are what comes out"),
        (
            Decoder(kind="none", stride=16, scale=0.2325),
            16,
            "none; latents are what comes out: 16 channels, stride 16, patch 1, scale 0.2325, shift 0",
        ),
    ],
)
def test_decoders(decoder: Decoder, channels: int, text: str) -> None:
    model = {**valid(), "token_channels": channels, "decoder": msgspec.to_builtins(decoder)}
    architecture, _ = decoded(model)
    assert architecture.decoder == decoder
    assert architecture.decoding == text
    assert ("decoder" in graph_specs(architecture)) == architecture.decoder.makes_pictures == (decoder.kind != "none")


@pytest.mark.parametrize("name", sorted(valid()))
def test_every_field_is_needed(name: str) -> None:
    section = valid()
    del section[name]
    with pytest.raises(ValueError, match=name):
        decoded(section)


def test_extra_field() -> None:
    with pytest.raises(ValueError, match="wings"):
        decoded({**valid(), "wings": 2})
    with pytest.raises(ValueError, match="wings"):
        decoded(valid(), {**NAMES, "wings": 2})


@pytest.mark.parametrize("value", [None, [], "mar-b", 3])
def test_not_an_object(value: object) -> None:
    with pytest.raises(ValueError, match="object"):
        decoded(value)


@pytest.mark.parametrize("value", [-1, 1.5, 16.0, "16", True, None, [16], 10**400, 1 << 40])
@pytest.mark.parametrize(
    "name", ["token_channels", "classes", "buffer", "width", "depth", "heads", "head_depth", "head_width"]
)
def test_sizes_are_integers_of_a_sane_size(name: str, value: object) -> None:
    with pytest.raises(ValueError, match="int"):
        decoded({**valid(), name: value})


@pytest.mark.parametrize("name", ["token_channels", "classes", "width", "depth", "heads", "head_depth", "head_width"])
def test_only_the_buffer_may_be_empty(name: str) -> None:
    with pytest.raises(ValueError, match=">= 1"):
        decoded({**valid(), name: 0})
    assert decoded({**valid(), "buffer": 0})


@pytest.mark.parametrize(
    "value", [16, [16], [16] * 3, [16, 0], [16, True], [16, 16.0], ["16", "16"], [1 << 20, 1], None]
)
def test_grid(value: object) -> None:
    with pytest.raises(ValueError, match="grid"):
        decoded({**valid(), "grid": value})


@pytest.mark.parametrize("value", [1, None, ["kl16"], "", "../up", "a\x1b[31m", "x" * 101])
def test_names_are_plain(value: object) -> None:
    with pytest.raises(ValueError, match="str"):
        decoded({**valid(), "name": value})


def test_width_must_be_a_multiple_of_heads() -> None:
    with pytest.raises(ValueError, match=r"width 96 is not a multiple of 5 heads"):
        decoded({**valid(), "heads": 5})


@pytest.mark.parametrize(
    "decoder",
    [
        {"kind": "vqgan", "stride": 8},
        {"kind": "kl"},
        {"kind": "kl", "stride": 16, "scale": 0},
        {"kind": "kl", "stride": 16, "shift": "0"},
        {"kind": "kl", "stride": 10**6},
        {"kind": "kl", "stride": 16, "groups": 0},
        {"kind": "patches", "stride": 2},
        {"kind": "patches", "stride": 1, "patch": 4, "scale": 2.0},
        "kl16",
    ],
)
def test_a_decoder_that_is_none(decoder: object) -> None:
    with pytest.raises(ValueError, match="decoder"):
        decoded({**valid(), "decoder": decoder})


def test_an_unknown_family() -> None:
    with pytest.raises(ValueError, match=r"^family 'gan' is not one of mar, mar-unconditional$"):
        decoded({**valid(), "family": "gan"})


@pytest.mark.parametrize(
    "conditioning",
    [{}, {"class_names": []}, {"class_names": ["a"] * 4}, {"class_names": [1, 2, 3, 4, 5]}, {"class_names": [""] * 5}],
)
def test_class_names_are_those_of_the_classes(conditioning: object) -> None:
    with pytest.raises(ValueError, match=r"class.names"):
        decoded(valid(), conditioning)


def test_tokens_are_whole_patches() -> None:
    model = valid()
    model["decoder"]["patch"] = 4
    assert decoded(model)[0].image_size == (384, 640)
    model["decoder"] = {"kind": "patches", "stride": 1, "patch": 2}
    with pytest.raises(ValueError, match="16 channels of a token are neither 2x2 grey pixels nor RGB ones"):
        decoded(model)
    model["decoder"]["patch"] = 3
    with pytest.raises(ValueError, match="16 channels of a token are not those of 3x3 patches"):
        decoded(model)
