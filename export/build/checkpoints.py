"""Checkpoint files in, checked state dicts out; and random stand-ins for trying the pipeline without any.

What a file holds must have exactly the keys and shapes of the model that was asked for, and finite numbers. Does not
know where files come from (download.py), how one is read without trusting it (reading.py), where in it the weights are
(state_dicts.py), or what they are used for (networks.py).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...runtime.errors import GtrError, printable
from ...runtime.models.architecture import Architecture
from ...runtime.models.families import known_models
from ...runtime.models.mar import MarArchitecture
from ..families import export_family
from .files import refusal
from .inference import find
from .layouts import is_emigm, official
from .reading import read_checkpoint
from .state_dicts import YOUNG, StateDict, choose, find_state_dicts, movement
from .told import Told

HEAD_PREFIX = "diffloss.net."
_NAMED = 3  # an error names this many keys of its only kind, one of several kinds, then counts the rest
_LONGEST_NAME = 40


class Taken(NamedTuple):
    """What was taken of a file.

    Attributes:
        weights: of the expected names, exactly; in the file's dtype and still mapped to it where the format allows.
        found: where in the file they were; None where nothing was read.
        warning: what is wrong with them, or empty.
    """

    weights: dict[str, Tensor]
    found: StateDict | None = None
    warning: str = ""


def load_mar(path: Path, architecture: Architecture, wanted: str = "auto") -> Taken:
    """MAR weights from an official .pth, other people's wrappings of one, a plain state dict, or .safetensors.

    Args:
        path: the file, an index of shards or a folder; its content decides how it is read, not its suffix.
        architecture: the model that it must hold.
        wanted: one of ``state_dicts.CHOICES``.

    Returns:
        The state dict in the official layout, and what was taken.

    Raises:
        GtrError: no such file, not a checkpoint, one that cannot be read safely, without the weights that are wanted,
            with another model's weights, or with weights that are not finite.
    """
    content = read_checkpoint(path)
    expected = expected_mar(architecture)
    unread = export_family(architecture).unread
    candidates = find_state_dicts(content, expected)
    found = choose(path, candidates, wanted, expected)
    if is_emigm(found.entries) and architecture.name in known_models():
        hint = "build it without --model: gtr-export build --checkpoint FILE"
        raise refusal(path, f"does not hold the weights of {architecture.name}: it has eMIGM's layout; {hint}")
    candidates = [state._replace(entries=official(state.entries, unread)) for state in candidates]
    found = found._replace(entries=official(found.entries, unread))
    problems = compare(found.entries, expected)
    if problems:
        hint = _mar_hint(found.entries, architecture)
        raise refusal(path, f"does not hold the weights of {architecture.name}: {problems}; {hint}")
    weights = usable(path, found.entries, expected)
    return Taken(weights, found, _young(found, weights, candidates, expected) if found.weights == "ema" else "")


def _young(
    found: StateDict, weights: Mapping[str, Tensor], candidates: Iterable[StateDict], expected: Mapping[str, Any]
) -> str:
    """A warning of EMA weights that the training has hardly reached yet."""
    for other in candidates:
        if other.weights == "model" and not compare(other.entries, expected):
            moved = movement(weights, other.entries)
            if moved is not None and moved < YOUNG:
                return (
                    f"warning: {found.key or found.prefix} is hardly trained: its biases and norms have moved "
                    f"{moved:.0%} as far from where training begins as the model's; --weights model takes those"
                )
    return ""


# Checking


def expected_mar(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a MAR state dict in the official layout."""
    networks = export_family(architecture).networks.values()
    with torch.device("meta"):
        return {key: shape for row in networks for key, shape in shapes_of(row.build(architecture), row.prefix).items()}


def shapes_of(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a module's state dict."""
    return {prefix + key: tuple(value.shape) for key, value in module.state_dict().items()}


def compare(state: Mapping[Any, Any], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with a state dict: missing, unexpected and wrong entries, a few of each; empty if nothing is."""
    missing = [key for key in expected if key not in state]
    unexpected = [printable(str(key), _LONGEST_NAME) for key in state if key not in expected]
    wrong: list[str] = []
    for key, shape in expected.items():
        if key not in state:
            continue
        value = state[key]
        if not isinstance(value, Tensor):
            wrong.append(f"{key} is a {type(value).__name__}, not a tensor")
        elif tuple(value.shape) != shape:
            wrong.append(f"{key} is {_size(value.shape)}, not {_size(shape)}")
        elif not value.is_floating_point() or value.layout != torch.strided or value.device.type != "cpu":
            wrong.append(f"{key} is {value.dtype} ({value.layout}, on {value.device.type}), not plain floating point")
    kinds = [
        (kind, found) for kind, found in (("missing", missing), ("unexpected", unexpected), ("wrong:", wrong)) if found
    ]
    return "; ".join(f"{kind} {_few(found, 1 if len(kinds) > 1 else _NAMED)}" for kind, found in kinds)


def _repeats(value: Tensor) -> bool:
    """Whether strides let one number of the file stand for several weights: a few bytes could claim to be terabytes."""
    reach = 0
    for stride, length in sorted(zip(value.stride(), value.shape, strict=True)):
        if length > 1 and stride <= reach:
            return True
        reach += stride * (length - 1)
    return False


def usable(path: Path, state: Mapping[Any, Any], keys: Iterable[str]) -> dict[str, Tensor]:
    """These weights of a state dict, each number in its own place and finite as float32.

    Raises:
        GtrError: they are not.
    """
    weights = {key: state[key].detach() for key in keys}
    lying = [key for key, value in weights.items() if _repeats(value)]
    if lying:
        raise refusal(path, f"holds fewer numbers than weights: those of {_few(lying)} lie upon each other; refused")
    bad = []
    for key, value in weights.items():
        if not all(map(math.isfinite, map(float, value.float().aminmax()))):  # NaN comes through; no mask in memory
            bad.append((key, value.float()))
    if bad:
        key, value = bad[0]
        amounts = ((value.isnan(), "NaN"), (value.isinf(), "infinite"))
        counts = " and ".join(f"{int(found.sum())} {kind}" for found, kind in amounts if found.any())
        more = f", and {len(bad) - 1} more tensors have such" if len(bad) > 1 else ""
        advice = "the training that wrote it went wrong; give an earlier checkpoint"
        raise refusal(path, f"has weights that are not finite: {key} has {counts} of {value.numel()}{more}; {advice}")
    return weights


def _few(items: Sequence[str], named: int = _NAMED) -> str:
    rest = len(items) - named
    return ", ".join(items[:named]) + (f" and {rest} more" if rest > 0 else "")


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(length) for length in shape) or "a scalar"


def _mar_hint(state: Mapping[Any, Any], architecture: Architecture) -> str:
    found = looks_like(state)
    if found in known_models() and found != architecture.name:
        return f"this looks like {found}, try --model {found}"
    if "decoder.conv_in.weight" in state:
        return "this looks like the VAE, give it with --vae"
    with suppress(GtrError):
        if not compare(state, expected_mar(find(state, None, Told()).shapes())):
            return "its sizes are its own, build it without --model: gtr-export build --checkpoint FILE"
    return "check --model and --checkpoint"


def looks_like(state: Mapping[Any, Any]) -> str | None:
    """The zoo model whose sizes a state dict has; ``an unknown MAR`` for other sizes, None where it is no MAR."""
    embedding = _shape_of(state, "class_emb.weight")
    projection = _shape_of(state, HEAD_PREFIX + "input_proj.weight")
    if embedding is None or projection is None:
        return None
    depth, head_depth = (_blocks(state, prefix) for prefix in ("encoder_blocks.", HEAD_PREFIX + "res_blocks."))
    sizes = (*embedding, depth, projection[0], head_depth)
    for name, model in known_models().items():
        known = model.architecture
        if not isinstance(known, MarArchitecture):
            continue
        if sizes == (known.classes, known.width, known.depth, known.head_width, known.head_depth):
            return name
    return "an unknown MAR"


def _shape_of(state: Mapping[Any, Any], key: str) -> tuple[int, ...] | None:
    value = state.get(key)
    return tuple(value.shape) if isinstance(value, Tensor) and value.dim() == 2 else None


def _blocks(state: Mapping[Any, Any], prefix: str) -> int:
    return len({key[len(prefix) :].partition(".")[0] for key in map(str, state) if key.startswith(prefix)})


# Random stand-ins


def random_mar(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Random float32 weights of the right shapes, for structure and timing only: the images are noise.

    Every key has its own generator, so its values depend on ``seed``, its name and its shape alone.
    """
    return {key: random_tensor(key, shape, seed) for key, shape in expected_mar(architecture).items()}


def random_tensor(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if len(shape) == 1:  # biases, and the weights of LayerNorm and GroupNorm
        return torch.ones(shape) if key.endswith(".weight") else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{zlib.crc32(key.encode())}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, _deviation(key, shape), generator=generator)


def _deviation(key: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a random weight: activations of order 1, a predicted noise near 0."""
    per_input = 1 / math.sqrt(math.prod(shape[1:]))
    if key.startswith(HEAD_PREFIX + "final_layer.linear."):
        return 0.02 * per_input
    if key.startswith(("class_emb.", HEAD_PREFIX + "time_embed.")) or "adaLN_modulation" in key:
        return 0.02
    return per_input if key.endswith(".weight") else 0.02  # without ".weight": position and token embeddings
