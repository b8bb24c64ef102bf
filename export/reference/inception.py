"""Inception features for ``gtr-run evaluate``: torch-fidelity's network behind the runtime's entry point.

torch-fidelity's port is the network that published FIDs are computed with (the TensorFlow one of 2015-12-05), MAR's own
evaluation included.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...runtime.errors import GtrError
from ...runtime.quality.inception import INSTALL, Extract

OUTPUTS = ("2048", "logits_unbiased")
"""Features and logits in torch-fidelity's words; its own Inception score uses the unbiased logits too."""
CHUNK = 64
"""Pictures that the network sees at once."""


def open_features(weights: Path | None = None, device: str | None = None) -> Extract:
    """The network as a function of pictures.

    Args:
        weights: file in torch-fidelity's format (``weights-inception-2015-12-05-6726825d.pth``); downloaded if None.
        device: torch's name; CUDA where there is one if None.

    Raises:
        GtrError: torch-fidelity cannot be imported, or the weights are missing or do not fit.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except (ImportError, RuntimeError) as error:  # torchvision for another torch fails with a RuntimeError
        raise GtrError(f"torch-fidelity cannot be imported; {INSTALL} ({error})") from None
    if weights is not None:
        checked(weights)
    where = f"--inception-weights {weights}" if weights else "the Inception weights (give a file: --inception-weights)"
    try:
        network: Any = FeatureExtractorInceptionV3(
            "inception", list(OUTPUTS), feature_extractor_weights_path=None if weights is None else str(weights)
        )
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise GtrError(f"{where}: {str(error).splitlines()[0][:200]}") from None
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = network.to(place).eval()

    @torch.inference_mode()
    def extract(images: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        features, posteriors = [], []
        for start in range(0, len(images), CHUNK):
            part = np.ascontiguousarray(images[start : start + CHUNK].transpose(0, 3, 1, 2))
            pooled, logits = network(torch.from_numpy(part).to(place))
            features.append(pooled.cpu().numpy())
            posteriors.append(logits.double().softmax(dim=1).cpu().numpy())
        return np.concatenate(features), np.concatenate(posteriors)

    return extract


def checked(weights: Path) -> None:
    """Refuses a file that is no plain state dict: torch-fidelity itself would run whatever a pickle wants to run.

    Raises:
        GtrError: it cannot be read as tensors by name.
    """
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise GtrError(f"--inception-weights {weights}: {str(error).splitlines()[0][:200]}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise GtrError(f"--inception-weights {weights} is not a state dict of tensors")
