"""The model section of a manifest is read strictly; sizes agree with the published models."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from gtr_deploy.export.graphs.backbone import Backbone
from gtr_deploy.export.graphs.diffusion_head import DiffusionHead
from gtr_deploy.runtime.errors import BundleError
from gtr_deploy.runtime.models.architecture import ARCHITECTURES, Architecture


def valid() -> dict[str, Any]:
    return {
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
        "decoder": "kl16",
        "label_names": "digits",
    }


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
        backbone, diffusion_head = Backbone(ARCHITECTURES[name]), DiffusionHead(ARCHITECTURES[name])

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(backbone) + count(diffusion_head) == total
    assert count(backbone.encoder_blocks) == count(backbone.decoder_blocks)
    assert count(backbone.encoder_blocks) / 1e6 == pytest.approx(encoder, abs=0.1)
    assert count(diffusion_head) / 1e6 == pytest.approx(head, abs=0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip(name: str) -> None:
    architecture = ARCHITECTURES[name]
    assert architecture.name == name
    assert Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture


def test_derived_sizes() -> None:
    architecture = Architecture.from_json(valid())
    assert architecture.grid == (6, 10)
    assert architecture.tokens == 60
    assert architecture.null_label == 5
    assert architecture.image_size == (96, 160)
    assert replace(architecture, decoder="patches").image_size == (24, 40)
    assert replace(architecture, decoder="patches", token_channels=9).image_size == (18, 30)
    assert ARCHITECTURES["mar-h"].image_size == (256, 256)
    assert ARCHITECTURES["mar-digits"].image_size == (32, 32)


@pytest.mark.parametrize("name", sorted(valid()))
def test_every_field_is_needed(name: str) -> None:
    section = valid()
    del section[name]
    with pytest.raises(BundleError) as error:
        Architecture.from_json(section)
    assert str(error.value) == (
        f"model section must have exactly the fields {sorted(valid())}, found {sorted(set(valid()) - {name})}"
    )


def test_extra_field() -> None:
    with pytest.raises(BundleError, match=r"^model section must have exactly the fields .*, found .*'wings'"):
        Architecture.from_json({**valid(), "wings": 2})


@pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), ([], "list"), ("mar-b", "str"), (3, "int")])
def test_not_an_object(value: object, kind: str) -> None:
    with pytest.raises(BundleError, match=f"^model section must have exactly the fields .*, found {kind}$"):
        Architecture.from_json(value)


@pytest.mark.parametrize("value", [0, -1, 1.5, 16.0, "16", True, None, [16]])
@pytest.mark.parametrize(
    "name", ["token_channels", "classes", "buffer", "width", "depth", "heads", "head_depth", "head_width"]
)
def test_sizes_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(BundleError) as error:
        Architecture.from_json({**valid(), name: value})
    assert str(error.value) == f"model section: {name} = {value!r} is not valid"


@pytest.mark.parametrize("value", [16, [16], [16] * 3, [16, 0], [16, True], [16, 16.0], ["16", "16"], (16, 16), None])
def test_grid(value: object) -> None:
    with pytest.raises(BundleError) as error:
        Architecture.from_json({**valid(), "grid": value})
    assert str(error.value) == f"model section: grid = {value!r} is not valid"


@pytest.mark.parametrize("name", ["name", "decoder", "label_names"])
@pytest.mark.parametrize("value", [1, None, ["kl16"]])
def test_names_are_strings(name: str, value: object) -> None:
    with pytest.raises(BundleError) as error:
        Architecture.from_json({**valid(), name: value})
    assert str(error.value) == f"model section: {name} = {value!r} is not valid"


def test_width_must_be_a_multiple_of_heads() -> None:
    with pytest.raises(BundleError, match=r"^model section: width 96 is not a multiple of 5 heads$"):
        Architecture.from_json({**valid(), "heads": 5})


def test_unknown_decoder() -> None:
    with pytest.raises(BundleError, match=r"^model section: decoder 'vqgan' is not kl16 or patches$"):
        Architecture.from_json({**valid(), "decoder": "vqgan"})


def test_unknown_label_names() -> None:
    with pytest.raises(BundleError, match=r"^model section: label_names 'birds' is not imagenet or digits$"):
        Architecture.from_json({**valid(), "label_names": "birds"})
