"""Which decoder a model of one's own needs: what its VAE's file, the training's arguments and options say.

As in inference.py, nothing is guessed that shapes cannot prove wrong. Imports no torch; reads no file (vae.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from ...runtime.errors import GtrError, UsageError
from ...runtime.models.architecture import Decoder
from ...runtime.models.mar import KL16
from .told import Told, VaeFacts

_KL16_CHANNELS = 16


class _Findings(Protocol):
    """What is known so far (inference.py)."""

    @property
    def values(self) -> Mapping[str, Any]: ...

    def add(self, name: str, value: Any, origin: str) -> None: ...


def choose_decoder(found: _Findings, told: Told) -> None:
    """Adds ``decoder``, the kind, and what goes with it, as far as anybody says it.

    Raises:
        GtrError: no such decoder can be; the line has both numbers.
        UsageError: an option contradicts the file.
    """
    if told.decoder == "none":
        found.add("decoder", "none", "--no-decoder")
    elif told.vae is not None:
        _autoencoder(found, told, told.vae)
    elif told.decoder == "pixels" or (told.decoder is None and _looks_like_pixels(found)):
        _pixels(found, told)
    elif _looks_like_kl16(found):
        found.add("decoder", "kl", "16 channels of stride 16 are KL-16's")
        _scale(found, told, VaeFacts(_KL16_CHANNELS, KL16.stride, shift=0.0, kl16=True))


def decoder_questions(values: Mapping[str, Any]) -> dict[str, str]:
    """What nobody says of the decoder, to the question and its option; empty where the patch size is not known yet."""
    kind, stride = values.get("decoder"), values.get("stride")
    if kind is None and "patch" in values:
        latents = f"{values['latent_channels']} channels" + (f" and stride {stride}" if stride else "")
        return {"decoder": f"which decoder latents of {latents} have (--vae FILE, --decoder pixels or --no-decoder)"}
    asked = {
        "scale": "what latents were multiplied by for training (--latent-scale X)",
        "shift": "what was subtracted from latents before that (--latent-shift X, 0 for nothing)",
    }
    return {name: question for name, question in asked.items() if kind == "kl" and name not in values}


def decoder_of(values: Mapping[str, Any]) -> Decoder:
    """The manifest's decoder, once nothing is missing."""
    kind, stride, patch = values["decoder"], values.get("stride"), values.get("patch", 1)
    if kind == "none":
        return Decoder(kind=kind, stride=stride or 1, patch=patch)
    if kind == "patches":
        return Decoder(kind=kind, stride=1, patch=patch * (stride or 1))
    scale, shift, groups = values["scale"], values["shift"], values.get("groups", 32)
    return Decoder(kind=kind, stride=stride or KL16.stride, patch=patch, scale=scale, shift=shift, groups=groups)


def _autoencoder(found: _Findings, told: Told, vae: VaeFacts) -> None:
    channels, origin = found.values["token_channels"], "--vae"
    patch = math.isqrt(channels // vae.channels)
    if patch**2 * vae.channels != channels:
        text = f"{channels} channels of a token (tensors), latents of {vae.channels} channels (--vae)"
        raise UsageError(f"contradicts: {text}: no patch of p x p cells has as many")
    found.add("decoder", "kl", origin)
    found.add("latent_channels", vae.channels, origin)
    found.add("stride", vae.stride, origin)
    found.add("patch", patch, f"{channels} token channels of --vae's {vae.channels}")
    if vae.groups != 32:
        found.add("groups", vae.groups, "config.json")
    _scale(found, told, vae)


def _scale(found: _Findings, told: Told, vae: VaeFacts) -> None:
    own = KL16.scale if vae.kl16 else None
    for name, typed, said, origin in (
        ("scale", told.scale, vae.scale or own, "MAR's own" if vae.scale is None else "config.json"),
        ("shift", told.shift, vae.shift, "MAR's own" if own else "config.json" if vae.scale else "--vae"),
    ):
        if typed is not None:
            beside = f", not {said:g} of {origin}" if said is not None and said != typed else ""
            found.add(name, typed, f"--latent-{name}{beside}")
        elif said is not None:
            found.add(name, said, origin)


def _looks_like_pixels(found: _Findings) -> bool:
    """A "VAE" whose latents are the pixels of a square themselves is no VAE, whatever the training called it."""
    if "latent_channels" not in found.values:
        return False
    channels, stride = found.values["latent_channels"], found.values.get("stride")
    return channels == (stride or 1) ** 2 or (stride is not None and channels == 3 * stride**2)


def _looks_like_kl16(found: _Findings) -> bool:
    stride = found.values.get("stride", KL16.stride)
    return (found.values.get("latent_channels"), stride) == (_KL16_CHANNELS, KL16.stride)


def _pixels(found: _Findings, told: Told) -> None:
    channels, values = found.values["token_channels"], found.values
    colours = next((c for c in (1, 3) if math.isqrt(channels // c) ** 2 * c == channels), None)
    if colours is None:
        text = f"--decoder pixels: {channels} channels of a token are neither p x p grey pixels nor 3 x p x p of RGB"
        raise UsageError(text)
    side, stride = math.isqrt(channels // colours), values.get("stride", 1)
    if values.get("patch", 1) > 1 and stride > 1:
        raise GtrError(f"has patches of {values['patch']}x{values['patch']} squares of {stride}x{stride} pixels each")
    if side % stride:
        raise GtrError(f"contradicts: {side}x{side} pixels ({channels} token channels), a stride of {stride}")
    found.add("decoder", "patches", "--decoder pixels" if told.decoder else f"{channels} channels of {side}x{side}")
    found.add("patch", side // stride, f"{channels} token channels are {side}x{side} pixels")
    found.add("stride", stride, "pixels")
