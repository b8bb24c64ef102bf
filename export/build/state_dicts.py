"""Where in a checkpoint the weights are, and whether they are the averaged ones (EMA).

Training code wraps a state dict in keys ({"state_dict": {"model_ema": ...}}) and its names in prefixes
(``module._orig_mod.``). Both are taken off here, and what they say is kept. Knows no model: the caller says which names
it looks for, and compares what it gets.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .files import refusal

EMA_KEYS = ("model_ema", "ema", "ema_model", "params_ema")
MODEL_KEYS = ("model", "module", "params")
WRAPPERS = (*EMA_KEYS, *MODEL_KEYS, "state_dict")
"""Keys that hold a state dict, or a mapping that does; the first of a kind is taken."""

CHOICES = {"auto": ("ema", "model", "unknown"), "ema": ("ema",), "model": ("model", "unknown")}
"""What ``--weights`` may say, and what is then taken, in this order."""

YOUNG = 0.5
"""An EMA that has moved less than this, measured by the model's own way, holds more of its beginning than of the
training. One of decay 0.9999 passes it after 7,000 steps. [ours]"""

Kind = Literal["ema", "model", "unknown"]
_PREFIXES = re.compile(r"(?:(?:module|_orig_mod|model|ema_model|model_ema|ema|first_stage_model)\.){1,6}")
_DEEPEST = 3  # wrappers within wrappers


class StateDict(NamedTuple):
    """A state dict that was found.

    Attributes:
        entries: names without the prefix, and values as they are in the file.
        key: the wrapping keys, joined by dots; empty for the file's own top.
        prefix: what was taken off every name; empty or ending in a dot.
        weights: ``ema``, ``model``, or ``unknown`` where nothing in the file says it.
        beside: whether the file has EMA weights, be it these or others.
    """

    entries: Mapping[Any, Any]
    key: str = ""
    prefix: str = ""
    weights: Kind = "unknown"
    beside: bool = False

    def __str__(self) -> str:
        """For people, such as ``model (no EMA weights in the file)``, or ``state_dict, without the prefix model.``"""
        note = {"ema": "", "unknown": ""}.get(self.weights, " (no EMA weights in the file)")
        if self.weights == "model" and self.beside:
            note = " (its EMA weights are left out)"
        return (self.key or "state dict") + note + (f", without the prefix {self.prefix}" if self.prefix else "")


def find_state_dicts(content: Mapping[Any, Any], names: Collection[str]) -> list[StateDict]:
    """All state dicts of a file, EMA first; the whole of it where nothing looks like one.

    Args:
        content: what ``reading.read_checkpoint`` gave.
        names: some or all names of the model: of several sets in one mapping those that have one are taken.
    """
    found = list(_walk(content, (), names, set())) or [StateDict(content)]
    if not any(state.weights == "ema" for state in found):
        return found
    # Beside EMA weights, those that do not say what they are are the model's.
    kinds = {"unknown": "model"}
    return [state._replace(weights=kinds.get(state.weights, state.weights), beside=True) for state in found]


def choose(path: Path, found: Iterable[StateDict], wanted: str, names: Collection[str]) -> StateDict:
    """The state dict that ``wanted``, of :data:`CHOICES`, asks for; of several of a kind the one with most ``names``.

    Raises:
        GtrError: the file has none of that kind.
    """
    for kind in CHOICES[wanted]:
        if fitting := [state for state in found if state.weights == kind]:
            return max(fitting, key=lambda state: sum(name in state.entries for name in names))
    if wanted == "ema":
        raise refusal(path, f"does not say that it holds EMA weights ({', '.join(EMA_KEYS)}); leave --weights ema out")
    raise refusal(path, "holds EMA weights and no others; leave --weights model out")


def movement(ema: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> float | None:
    """How far EMA weights have moved from where training began, measured by the model's own way; None if that stood
    still. 1 is usual, 0 an EMA that was never updated.

    Biases begin at 0 and the weights of norms at 1 whatever the seed, so that their distance from there is known.

    Args:
        ema, model: state dicts of the same names and shapes.
    """
    ways = []
    for state in (ema, model):
        squares = 0.0
        for name, value in state.items():
            if value.dim() == 1 and name.endswith((".weight", ".bias")):
                begin = 1.0 if name.endswith(".weight") else 0.0
                squares += float((value.detach().to(torch.float64) - begin).square().sum())
        ways.append(squares**0.5)
    return ways[0] / ways[1] if 0 < ways[1] < float("inf") else None


def _walk(
    mapping: Mapping[Any, Any], keys: tuple[str, ...], names: Collection[str], seen: set[int]
) -> Iterable[StateDict]:
    seen.add(id(mapping))  # a pickle's mapping can hold itself
    found: list[StateDict] = []
    for key in WRAPPERS if len(keys) < _DEEPEST else ():
        inner = mapping.get(key)
        if isinstance(inner, Mapping) and id(inner) not in seen:
            found += _walk(inner, (*keys, key), names, seen)
    return found or _sets(mapping, keys, names)


def _sets(mapping: Mapping[Any, Any], keys: tuple[str, ...], names: Collection[str]) -> list[StateDict]:
    """The state dicts of one mapping, one for each prefix of its names."""
    sets: dict[str, dict[Any, Any]] = {}
    for name, value in mapping.items():
        match = _PREFIXES.match(name) if type(name) is str else None
        prefix = match[0] if match else ""
        sets.setdefault(prefix, {})[name[len(prefix) :] if prefix else name] = value
    sets = {prefix: state for prefix, state in sets.items() if any(isinstance(v, Tensor) for v in state.values())}
    known = {prefix: state for prefix, state in sets.items() if any(name in state for name in names)}
    named = any(_says_ema(prefix.split(".")) for prefix in known or sets)
    result = []
    for prefix, state in (known or sets).items():
        if _says_ema(prefix.split(".")) or (_says_ema(keys) and not named):
            kind = "ema"
        else:
            kind = "model" if named or set(keys) & set(MODEL_KEYS) else "unknown"
        result.append(StateDict(state, ".".join(keys), prefix, kind))
    return result


def _says_ema(parts: Iterable[str]) -> bool:
    return any(part in EMA_KEYS for part in parts)
