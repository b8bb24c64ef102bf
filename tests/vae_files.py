"""VAE files in every layout that people have, with the weights of the recordings in tests/data/vae_diffusers."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

CASES = json.loads((Path(__file__).parent / "data" / "vae_diffusers.json").read_text())["cases"]
"""Name of a recording to its ``config`` and ``keys``."""


def by_rule(keys: Mapping[str, Any]) -> dict[str, Tensor]:
    """As the recordings' weights."""

    def one(key: str, shape: list[int]) -> Tensor:
        value = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            value = value / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            value = np.float32(0.1) * value + np.float32(key.endswith(".weight"))
        return torch.from_numpy(value)

    return {key: one(key, shape) for key, shape in keys.items()}


def old_names(key: str) -> str:
    """diffusers' before 0.17."""
    for now, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        key = key.replace(f".{now}.", f".{before}.")
    return key


def ldm_names(key: str, levels: int) -> str:
    """latent diffusion's, spelled out once more and the other way round than vae.py does it."""
    for theirs, ours in (
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        *((rf"up_blocks\.{n}\.", f"up.{levels - 1 - n}.") for n in range(levels)),
        (r"resnets", "block"),
        (r"attentions", "attn"),
        (r"upsamplers\.0", "upsample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"group_norm", "norm"),
        (r"to_out\.0", "proj_out"),
        (r"\.to_([qkv])", r".\1"),
        (r"conv_norm_out", "norm_out"),
    ):
        key = re.sub(theirs, ours, key)
    return key


def write_vae(folder: Path, case: str, layout: str) -> Path:
    """A VAE in one of the layouts that people have; what ``--vae`` gets."""
    config, state = CASES[case]["config"], by_rule(CASES[case]["keys"])
    ours = {ldm_names(key, len(config["block_out_channels"])): value for key, value in state.items()}
    ours = {key: value[:, :, None, None] if value.dim() == 2 else value for key, value in ours.items()}
    unused = {"encoder.conv_in.weight": torch.zeros(2), "quant_conv.bias": torch.zeros(2)}
    if layout == "ldm":
        torch.save({"state_dict": {**ours, **unused, "loss.a": torch.zeros(2)}, "epoch": 3}, folder / "vae.ckpt")
        return folder / "vae.ckpt"
    if layout == "within":
        others = {"model.diffusion_model.out.weight": torch.zeros(3), "cond_stage_model.x": torch.zeros(3)}
        save_file({**{f"first_stage_model.{key}": value for key, value in ours.items()}, **others}, folder / "sd")
        return folder / "sd"
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "folder":
        save_file(state | unused, folder / "diffusion_pytorch_model.safetensors")
        save_file({"a": torch.zeros(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    elif layout == "old .bin":
        torch.save({old_names(key): value for key, value in state.items()}, folder / "diffusion_pytorch_model.bin")
    else:
        parts: dict[str, dict[str, Tensor]] = {"1.safetensors": {}, "2.safetensors": {}}
        for number, (key, value) in enumerate(state.items()):
            parts[f"{number % 2 + 1}.safetensors"][key] = value
        for name, part in parts.items():
            save_file(part, folder / name)
        weight_map = {key: name for name, part in parts.items() for key in part}
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    return folder
