"""The architecture of a MAR checkpoint from what its file holds: shapes of tensors, the training's arguments, options.

Nothing is guessed that shapes cannot prove wrong: what neither file nor options say is missing, by name of the option.
Does not know how a file is read (checkpoints.py), and imports no torch: a tensor is what has a shape.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ...runtime.errors import GtrError, UsageError, printable
from ...runtime.models.families import known_models
from ...runtime.models.mar import MarArchitecture, UnconditionalArchitecture
from .decoder_choice import choose_decoder, decoder_of, decoder_questions
from .layouts import CLASSES, guidance_interval, is_emigm, official, published, shape_of, unconditional
from .told import Told

ORIGINAL_NAMES = {"mar_base": "mar-b", "mar_large": "mar-l", "mar_huge": "mar-h"}
"""The original's ``--model`` to the same sizes here; of others only the underscores differ."""

_ARGS = {
    "classes": "class_num",
    "buffer": "buffer_size",
    "head_depth": "diffloss_d",
    "head_width": "diffloss_w",
    "patch": "patch_size",
    "latent_channels": "vae_embed_dim",
    "stride": "vae_stride",
}
"""What is found to the original's argument that says it, too (main_mar.py)."""

_ASKED = {
    "heads": "how many attention heads (--heads N)",
    "patch": "how many latent cells or pixels along a token's side (--patch-size N)",
    "grid": "how many rows and columns of tokens (--grid HxW)",
}
_LARGEST = 1 << 16


@dataclass(frozen=True)
class Findings:
    """Sizes by name, each with where it was found.

    Attributes:
        values: ``classes``, ``width``, ``depth``, ``head_depth``, ``head_width``, ``token_channels``, ``tokens`` and
            ``buffer`` always; ``heads``, ``patch``, ``grid`` and the kind of ``decoder`` where somebody says them;
            ``latent_channels`` of a cell, its ``stride`` in pixels, ``scale``, ``shift`` and ``groups`` with them.
        origins: ``tensors``, ``args.NAME``, an option, or ``square``.
        notes: what else people should know, a line each.
        plan_defaults: what plans on a published model start from.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    plan_defaults: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: Any, origin: str) -> None:
        """One more source of a size.

        Raises:
            UsageError: an option says another value than the file.
            GtrError: the file contradicts itself.
        """
        known = self.values.setdefault(name, value)
        first = self.origins.setdefault(name, origin)
        if known != value:
            kind = UsageError if "--" in first + origin else GtrError
            label = name.replace("_", " ")
            raise kind(f"contradicts: {label} {shown(known)} ({first}), {shown(value)} ({origin})")

    @property
    def missing(self) -> dict[str, str]:
        """What nobody says, to the question and its option."""
        asked = {name: question for name, question in _ASKED.items() if name not in self.values}
        if self.values.get("decoder") == "none":
            asked.pop("patch", None)  # nothing is done with it
        return asked | decoder_questions(self.values)

    @property
    def summary(self) -> str:
        """What was taken from where, on one line."""
        origins = dict.fromkeys(self.origins.values())
        return "; ".join(
            ", ".join(f"{name.replace('_', ' ')} {shown(self.values[name])}" for name in names) + f" ({origin})"
            for origin in origins
            if (names := [name for name in self.values if self.origins[name] == origin])
        )

    def architecture(self, name: str) -> MarArchitecture | UnconditionalArchitecture:
        """The model's sizes, under a name of its own.

        Raises:
            UsageError: something is missing; the line has the options.
            GtrError: no such model can be.
        """
        if self.missing:
            raise UsageError(f"does not say {', nor '.join(self.missing.values())}")
        return self._made(name=name, decoder=msgspec.to_builtins(decoder_of(self.values)))

    def shapes(self) -> MarArchitecture | UnconditionalArchitecture:
        """A model of the same tensors, whatever is missing: heads, grid and patches change none."""
        tokens = self.values["tokens"]
        rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
        decoder = {"kind": "none", "stride": 1}
        return self._made(name="any", heads=1, grid=(rows, tokens // rows), decoder=decoder)

    def _made(self, **more: Any) -> MarArchitecture | UnconditionalArchitecture:
        kind = MarArchitecture if self.values["classes"] else UnconditionalArchitecture
        sizes = {key: self.values[key] for key in kind.__struct_fields__ if key in self.values}
        try:
            return msgspec.convert({"family": kind.__struct_config__.tag, **sizes, **more}, kind)
        except msgspec.ValidationError as error:
            raise GtrError(f"cannot be a model of this family: {error}") from None


def find(state: Mapping[Any, Any], args: Any, told: Told) -> Findings:
    """What tensors, arguments and options say, in this order.

    Args:
        state: a state dict in the official layout; only shapes are looked at.
        args: the file's ``args``: a Namespace, a mapping, or None.
        told: what a person says.

    Raises:
        GtrError: no MAR in the official layout, or contradictions; a text without the file's name.
        UsageError: an option contradicts the file.
    """
    found = Findings()
    given = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    reason = unconditional(state, given, told.unconditional)
    emigm = is_emigm(state)
    state = official(state, (CLASSES,) if reason else ())
    _from_tensors(found, state)
    if reason:
        found.notes.append(f"unconditional ({reason}): nothing is asked of it, and nothing is guided")
    _from_args(found, given)
    if emigm:
        _from_emigm(found)
    for name, option, value in (("heads", "--heads", told.heads), ("patch", "--patch-size", told.patch_size)):
        if value is not None:
            found.add(name, value, option)
    _latents(found)
    choose_decoder(found, told)
    _grid(found, given.get("img_size"), told.grid)
    return found


def _from_tensors(found: Findings, state: Mapping[Any, Any]) -> None:
    classes, width = _shape(state, CLASSES, 2) if CLASSES in state else (0, _shape(state, "fake_latent", 2)[1])
    _, tokens, _ = _shape(state, "diffusion_pos_embed_learned", 3)
    _, slots, _ = _shape(state, "encoder_pos_embed_learned", 3)
    head_width, channels = _shape(state, "diffloss.net.input_proj.weight", 2)
    sizes = {
        "classes": classes,
        "width": width,
        "depth": _blocks(state, "encoder_blocks."),
        "head_depth": _blocks(state, "diffloss.net.res_blocks."),
        "head_width": head_width,
        "token_channels": channels,
        "tokens": tokens,
        "buffer": slots - tokens,
    }
    for name, value in sizes.items():
        least = 0 if name == "buffer" or (name == "classes" and CLASSES not in state) else 1
        if not least <= value <= _LARGEST:
            raise GtrError(f"cannot be a model of this family: {name.replace('_', ' ')} {value}")
        found.add(name, value, "tensors")
    if (decoder := _blocks(state, "decoder_blocks.")) != sizes["depth"]:
        raise GtrError(f"has {sizes['depth']} encoder blocks and {decoder} decoder blocks; this version needs as many")


def _from_args(found: Findings, args: Mapping[Any, Any]) -> None:
    for name, argument in _ARGS.items():
        if name == "classes" and not found.values["classes"]:
            continue  # what the training was told, and did not use
        if args.get(argument) is not None:
            found.add(name, _whole(args[argument], argument), f"args.{argument}")
    model = args.get("model")
    if not isinstance(model, str):
        return
    entry = known_models().get(ORIGINAL_NAMES.get(model, model.replace("_", "-")))
    if entry is not None and isinstance(entry.architecture, MarArchitecture):
        for name in ("width", "depth", "heads"):
            found.add(name, getattr(entry.architecture, name), f"args.model {printable(model, 30)}")


def _from_emigm(found: Findings) -> None:
    """What goes with the sizes that are published; other sizes say as much as any MAR's."""
    model, stride = published(found.values) or (None, 0)
    name = model.name if model else "eMIGM"
    found.notes.append(f"{name}'s layout: its null embedding is its mask token, too")
    if model is None:
        return
    if model.times is None:
        found.notes.append("its latents are DC-AE's, for which this version has no decoder")
    for size, value in (("heads", model.heads), ("patch", 1), ("stride", stride)):
        if size not in found.values:
            found.add(size, value, name)
    if model.times is not None and found.values["classes"]:
        interval = guidance_interval(model.times)
        found.plan_defaults.update(cfg=4.0, cfg_schedule="constant", guidance_interval=interval)
        found.notes.append(f"plans start from {name}'s own guidance: cfg 4 between {interval[0]} and {interval[1]}")


def _latents(found: Findings) -> None:
    """Channels of one latent cell: a token has those of patch x patch cells."""
    if "patch" not in found.values:
        return
    channels, patch = found.values["token_channels"], found.values["patch"]
    if channels % patch**2:
        kind = UsageError if found.origins["patch"].startswith("--") else GtrError
        text = f"{channels} channels of a token (tensors), patches of {patch}x{patch} ({found.origins['patch']})"
        raise kind(f"contradicts: {text}")
    found.add("latent_channels", channels // patch**2, f"{channels} token channels of {patch}x{patch} patches")


def _grid(found: Findings, image_size: Any, grid: tuple[int, int] | None) -> None:
    tokens = found.values["tokens"]
    if image_size is not None and {"patch", "stride"} <= set(found.values):
        sides = image_size if isinstance(image_size, list | tuple) and len(image_size) == 2 else (image_size,) * 2
        height, width = (_whole(side, "img_size") for side in sides)
        token = found.values["patch"] * found.values["stride"]
        if height % token or width % token:
            raise GtrError(f"contradicts: images of {height}x{width} (args.img_size), tokens of {token}x{token} pixels")
        found.add("grid", (height // token, width // token), "args.img_size")
    if grid is not None:
        found.add("grid", grid, "--grid")
    if "grid" not in found.values and math.isqrt(tokens) ** 2 == tokens:
        found.add("grid", (math.isqrt(tokens),) * 2, "square")
    if "grid" in found.values:
        rows, columns = found.values["grid"]
        found.add("tokens", rows * columns, f"{found.origins['grid']} {rows}x{columns}")


def _shape(state: Mapping[Any, Any], key: str, axes: int) -> tuple[int, ...]:
    shape = shape_of(state, key)
    if shape is None or len(shape) != axes or not all(type(length) is int for length in shape):
        hint = "give the model's own checkpoint"
        if "decoder.conv_in.weight" in state:
            hint = "this looks like the VAE, give it with --vae"
        raise GtrError(f"is no MAR checkpoint in the official layout: no {key} of {axes} axes; {hint}")
    return shape


def _blocks(state: Mapping[Any, Any], prefix: str) -> int:
    return len({key[len(prefix) :].partition(".")[0] for key in map(str, state) if key.startswith(prefix)})


def _whole(value: Any, argument: str) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST or (value == 0 and argument != "buffer_size"):
        plain = isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 10**18)
        found = printable(str(value), 40) if plain else type(value).__name__
        raise GtrError(f"has args.{argument} {found}, which is no size")
    return value


def shown(value: Any) -> str:
    """A size as people write it; a grid as HxW."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
