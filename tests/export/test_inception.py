"""torch-fidelity's network behind the runtime's entry point; a small stand-in of its class and call takes its place.

The library itself needs torchvision built for the same torch, and weights of 91 MB; docs/quality.md says what was tried
with them.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gtr_deploy.export.reference import inception
from gtr_deploy.export.reference.inception import open_features
from gtr_deploy.runtime.errors import GtrError
from gtr_deploy.runtime.quality.inception import open_inception

MODULE = "torch_fidelity.feature_extractor_inceptionv3"


class StandIn(nn.Module):
    """Constructor and call as torch-fidelity 0.4 has them."""

    seen: list[torch.Tensor]

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        assert name
        assert features_list == ["2048", "logits_unbiased"]
        self.fc = nn.Linear(3, 5)
        self.seen = []
        if feature_extractor_weights_path is None:
            raise OSError("no network\nhere")
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        self.seen.append(images)
        pooled = images.float().mean(dim=(2, 3))
        return pooled, self.fc(pooled / 255)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType(MODULE)
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, MODULE, module)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(nn.Sequential(nn.Linear(3, 5)).state_dict(), tmp_path / "other.pth")
    torch.save({"fc.weight": torch.ones(5, 3), "fc.bias": torch.arange(5.0)}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.usefixtures("stand_in")
def test_pictures_arrive_channels_first_and_posteriors_add_up(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "CHUNK", 4)
    extract = open_features(weights, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (10, 6, 8, 3), dtype=np.uint8)
    features, posteriors = extract(images)
    np.testing.assert_allclose(features, images.mean(axis=(1, 2)), rtol=1e-5)
    logits = features.sum(axis=1, keepdims=True) / 255 + np.arange(5.0)
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(posteriors, wanted, rtol=1e-5)


@pytest.mark.usefixtures("stand_in")
def test_wrong_weights_are_one_line(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"fc": print}, tmp_path / "code.pth")
    for name, words in (
        ("text.pth", "text.pth"),
        ("list.pth", "not a state dict"),
        ("code.pth", "code.pth"),
        ("other.pth", "other.pth: Error"),
        ("gone.pth", "No such file"),
    ):
        with pytest.raises(GtrError, match=words) as caught:
            open_features(tmp_path / name, "cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(GtrError, match=r"give a file: --inception-weights\): no network$"):
        open_features(None, "cpu")


def test_the_runtime_finds_it_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(GtrError, match=r"torch-fidelity cannot be imported; pip install 'gtr-deploy\[evaluate\]'"):
        open_inception(None, None)
