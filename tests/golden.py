"""The generations recorded from the original MAR code (tests/data), as this project's architecture, plan and noise.

Recorded orders follow the original's convention, in which the end of an order is generated first; here
they are reversed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from recorded import RecordedNoise
from safetensors.torch import load_file

from gtr_deploy.export.networks import build_networks
from gtr_deploy.export.reference.torch_backend import TorchBackend
from gtr_deploy.runtime.models.architecture import Decoder
from gtr_deploy.runtime.models.mar import MarArchitecture
from gtr_deploy.runtime.sampling.plan import PlanSettings, SamplingPlan, resolve

DATA = Path(__file__).parent / "data"
CASES = (
    "mar_tiny_no_cfg",
    "mar_tiny_cfg_linear",
    "mar_tiny_cfg_constant",
    "digits_capped_950",
    "digits_original_respacing",
)
WEIGHT_SETS = {"mar_tiny": "mar_tiny_no_cfg", "digits": "digits_capped_950"}
"""Weight set to one of the cases recorded with it."""


@dataclass(frozen=True)
class GoldenCase:
    """One recorded generation."""

    name: str
    weight_set: str
    settings: dict[str, Any]
    architecture: MarArchitecture
    plan: SamplingPlan
    labels: list[int]
    orders: NDArray[np.int64]
    noise: RecordedNoise
    latents: NDArray[np.float32]
    arrays: dict[str, NDArray[Any]]


def load_case(name: str) -> GoldenCase:
    """A recorded generation by its file stem; latents as [B, L, C], orders in the order of generation."""
    settings = json.loads((DATA / f"{name}.json").read_text())
    with np.load(DATA / f"{name}.npz") as archive:
        arrays = dict(archive)
    weight_set = next(prefix for prefix in WEIGHT_SETS if name.startswith(prefix))
    architecture = _architecture(weight_set, settings["model"])
    kept = settings.get("kept_timesteps")
    steps = len(kept) if kept else settings["diffusion_steps"]
    plan = resolve(
        PlanSettings(
            name=name,
            stage_steps=(settings["num_iter"],),
            order="random",
            token_schedule="cosine",
            generation_diffusion=(steps, steps),
            fts="none",
            cfg=settings["cfg"],
            cfg_schedule=settings["cfg_schedule"],
            temperature=settings["temperature"],
            max_timestep=kept[-1] if kept else 999,
        ),
        architecture,
    )
    batch = settings["batch"]
    return GoldenCase(
        name=name,
        weight_set=weight_set,
        settings=settings,
        architecture=architecture,
        plan=plan,
        labels=arrays["labels"].tolist(),
        orders=np.ascontiguousarray(arrays["orders"][:, ::-1]),
        noise=RecordedNoise(arrays["noise0"], arrays["noise"]),
        latents=arrays["latents"].reshape(batch, architecture.token_channels, -1).transpose(0, 2, 1),
        arrays=arrays,
    )


def _architecture(name: str, model: dict[str, int]) -> MarArchitecture:
    side = model["img_size"] // model["vae_stride"] // model["patch_size"]
    return MarArchitecture(
        name=name,
        grid=(side, side),
        token_channels=model["vae_embed_dim"],
        classes=model["class_num"],
        buffer=model["buffer_size"],
        width=model["encoder_embed_dim"],
        depth=model["encoder_depth"],
        heads=model["encoder_num_heads"],
        head_depth=model["diffloss_d"],
        head_width=model["diffloss_w"],
        decoder=Decoder(kind="patches", stride=1, patch=4),
    )


@lru_cache
def load_weights(weight_set: str) -> dict[str, torch.Tensor]:
    """EMA weights of ``mar_tiny`` or ``digits``."""
    if weight_set == "digits":
        return load_file(DATA / "digits.safetensors")
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(DATA / "mar_tiny_checkpoint-last.pth", weights_only=True)
    return checkpoint["model_ema"]


@lru_cache
def torch_backend(weight_set: str) -> TorchBackend:
    """The torch reference with those weights."""
    architecture = load_case(WEIGHT_SETS[weight_set]).architecture
    return TorchBackend(build_networks(architecture, load_weights(weight_set), {}))


def relative_error(found: ArrayLike, expected: ArrayLike) -> float:
    """Norm of the difference over norm, in float64."""
    a, b = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape} differ"
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
