"""A KL autoencoder's file in, its decoder's checked weights out, under latent diffusion's names.

One network in two layouts: MAR's KL-16, latent diffusion's own (also within a Stable Diffusion checkpoint, under
``first_stage_model.``) and FLUX's share their names; diffusers' AutoencoderKL has others, and a config.json. Does not
know where the weights are in a file (state_dicts.py), nor what the network computes (graphs/kl_decoder.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from ...runtime.errors import printable
from ...runtime.models.architecture import Architecture, Size
from ..graphs.decoders import LatentDecoder, build_decoder
from ..graphs.kl_decoder import KL16_LAYOUT, KlLayout, layout_of
from .checkpoints import Taken, compare, looks_like, random_tensor, shapes_of, usable
from .files import DIFFUSERS, read_config, refusal, weights_file
from .reading import read_checkpoint
from .state_dicts import StateDict, choose, find_state_dicts
from .told import VaeFacts

UNUSED = ("encoder.", "quant_conv.", "loss.", "model_ema.")
"""Parts of a VAE file that decoding does not need."""

_LANDMARKS = ("decoder.conv_in.weight", "decoder.conv_out.weight")
"""Names that every layout has."""

_CLASS = "AutoencoderKL"
_PARTS = {
    "conv_shortcut": "nin_shortcut", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
"""Layers within a block, as diffusers calls them (attention's last four until 0.16), to latent diffusion's names."""


class _Config(Struct, frozen=True, rename={"kind": "_class_name"}):
    """What is read of diffusers' config.json; it holds more."""

    kind: str = ""
    latent_channels: Size | None = None
    block_out_channels: Annotated[tuple[Size, ...], Meta(max_length=16)] | None = None
    out_channels: Size = 3
    norm_num_groups: Annotated[int, Meta(ge=1, le=1024)] = 32
    act_fn: str = "silu"
    scaling_factor: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    shift_factor: Annotated[float, Meta(ge=-1e6, le=1e6)] | None = None
    latents_mean: object = None
    latents_std: object = None


class _Vae(NamedTuple):
    found: StateDict
    state: Mapping[str, Any]
    layout: KlLayout
    config: _Config | None
    names: str


def vae_facts(path: Path) -> VaeFacts:
    """What a VAE's file says of the latents that it decodes.

    Args:
        path: as for ``checkpoints.load_mar``; also a folder as diffusers saves it.

    Raises:
        GtrError: see :func:`load_vae_decoder`.
    """
    vae = _read(weights_file(path), None)
    layout, config = vae.layout, vae.config
    return VaeFacts(
        layout.latent_channels,
        layout.stride,
        layout.groups,
        config.scaling_factor if config else None,
        (config.shift_factor or 0.0) if config else None if layout.inner_channels is None else 0.0,
        layout == KL16_LAYOUT and config is None,
    )


def load_vae_decoder(path: Path, architecture: Architecture) -> Taken:
    """The decoder half of a KL autoencoder: ``decoder.*`` and, where it has one, ``post_quant_conv.*``.

    Args:
        path: as for :func:`vae_facts`. Not read where the model needs no VAE.
        architecture: the model whose latents it must decode.

    Returns:
        Exactly the keys of ``graphs.kl_decoder.KlDecoder``; empty for a model that decodes by itself.

    Raises:
        GtrError: no such file, not a checkpoint, one that cannot be read safely, not a KL autoencoder or one of other
            latents, or weights that are not finite.
    """
    if not architecture.decoder.has_weights:
        return Taken({})
    path = weights_file(path)
    vae = _read(path, architecture)
    state, layout, decoder = vae.state, vae.layout, architecture.decoder
    for what, found, wanted in (
        ("latents of {} channels", layout.latent_channels, architecture.cell_channels),
        ("a stride of {} pixels", layout.stride, decoder.stride),
        ("GroupNorms of {} groups", layout.groups, decoder.groups),
    ):
        if found != wanted:
            raise refusal(path, f"has {what.format(found)}, {architecture.name} needs {wanted}; give another --vae")
    with torch.device("meta"):
        expected = shapes_of(LatentDecoder(architecture, layout))
    if problems := compare(state, expected):
        raise _no_decoder(path, problems, vae.names, vae.found, architecture)
    return Taken(usable(path, state, expected), vae.found)


def expected_vae_decoder(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of KL-16's decoder; empty for a model that decodes by itself."""
    if not architecture.decoder.has_weights:
        return {}
    with torch.device("meta"):
        return shapes_of(build_decoder(architecture))


def random_vae_decoder(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """As ``checkpoints.random_mar``, for KL-16's decoder; empty for a model that decodes by itself."""
    return {key: random_tensor(key, shape, seed) for key, shape in expected_vae_decoder(architecture).items()}


def _read(path: Path, architecture: Architecture | None) -> _Vae:
    config = _config(path)
    found = choose(path, find_state_dicts(read_checkpoint(path), _LANDMARKS), "auto", _LANDMARKS)
    entries = {str(key): value for key, value in found.entries.items()}
    state = {key: value for key, value in entries.items() if not key.startswith(UNUSED)}
    theirs = any(key.startswith(("decoder.up_blocks.", "decoder.mid_block.")) for key in state)
    names = ""
    if theirs:
        state, names = _renamed(path, state), " (in latent diffusion's names)"
    groups = config.norm_num_groups if config else architecture.decoder.groups if architecture else 32
    try:
        layout = layout_of(state, groups)
    except ValueError as error:
        raise _no_decoder(path, f"{error}{names}", "", found, architecture) from None
    if config is not None:
        _compare_config(path, config, layout)
    return _Vae(found, state, layout, config, names)


def _no_decoder(path: Path, problems: str, names: str, found: StateDict, architecture: Architecture | None):
    hint = "give the VAE that the model was trained with"
    if looks_like(found.entries) is not None:
        hint = "this looks like a MAR checkpoint, give it with --checkpoint"
    whose = f" of {architecture.name}" if architecture else ""
    return refusal(path, f"does not hold the VAE decoder{whose}: {problems}{names}; {hint}")


def _renamed(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' names to latent diffusion's, which counts levels from the finished picture; attention is by 1x1
    convolutions there."""
    levels = {match[1] for key in state if (match := re.match(r"decoder\.up_blocks\.(\d)\.", key))}
    last = len(levels) - 1
    result: dict[str, Any] = {}
    for key, value in state.items():
        name = re.sub(r"^decoder\.mid_block\.resnets\.([01])\.", lambda m: f"decoder.mid.block_{int(m[1]) + 1}.", key)
        name = re.sub(r"^decoder\.mid_block\.attentions\.0\.", "decoder.mid.attn_1.", name)
        name = re.sub(r"^decoder\.up_blocks\.(\d)\.", lambda m: f"decoder.up.{last - int(m[1])}.", name)
        name = re.sub(r"^(decoder\.up\.\d\.)(resnets|attentions)\.(\d+)\.", _block, name)
        name = re.sub(r"^(decoder\.up\.\d\.)upsamplers\.0\.", r"\1upsample.", name)
        name = re.sub(r"^decoder\.conv_norm_out\.", "decoder.norm_out.", name)
        if part := re.fullmatch(rf"(decoder\.(?:mid|up)\..+?\.)({'|'.join(_PARTS)})\.(weight|bias)", name):
            name = f"{part[1]}{_PARTS[part[2]]}.{part[3]}"
        if isinstance(value, Tensor) and value.dim() == 2:
            value = value[:, :, None, None]
        if name in result:
            raise refusal(path, f"holds {printable(name, 60)} under two names; save it again with diffusers")
        result[name] = value
    return result


def _block(match: re.Match[str]) -> str:
    return f"{match[1]}{'block' if match[2] == 'resnets' else 'attn'}.{match[3]}."


def _config(path: Path) -> _Config | None:
    """diffusers' config.json beside the weights, if it is one of an autoencoder.

    Raises:
        GtrError: it is another model's, not what it should be, or asks for what no decoder here does.
    """
    read = read_config(path)
    if read is None:
        return None
    place, document = read
    if document.get("_class_name") != _CLASS and not path.name.startswith(DIFFUSERS):
        return None  # of something else that lies in this folder
    try:
        config = msgspec.convert(document, _Config)
    except msgspec.ValidationError as error:
        raise refusal(place, f"is not one of an {_CLASS} ({error}); download it again") from None
    if config.kind != _CLASS:
        shown = f"of {printable(config.kind, 60)}" if config.kind else "without a _class_name"
        raise refusal(place, f"is {shown}; this version decodes with an {_CLASS}")
    if config.act_fn not in ("silu", "swish") or config.latents_mean is not None or config.latents_std is not None:
        what = "latents_mean and latents_std" if config.act_fn in ("silu", "swish") else f"act_fn {config.act_fn}"
        raise refusal(place, f"has {printable(what, 60)}, which no decoder of this version does")
    return config


def _compare_config(path: Path, config: _Config, layout: KlLayout) -> None:
    for name, said, found in (
        ("latent_channels", config.latent_channels, layout.latent_channels),
        ("block_out_channels", config.block_out_channels, layout.widths),
    ):
        if said is not None and said != found:
            text = f"contradicts: {name} {said} (config.json), {found} (tensors)"
            raise refusal(path, f"{text}; download both again")
