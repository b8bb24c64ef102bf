"""Layouts of MAR's networks other than the official one, brought to it before anything is compared.

Told by keys, shapes and the training's arguments alone. Imports no torch: a tensor is what has a shape.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

CLASSES = "class_emb.weight"
_NULL, _MASK = "fake_latent", "mask_token"


@dataclass(frozen=True)
class Published:
    """A published eMIGM: attention heads, and the (t_min, t_max] of its 16-step evaluation, None where that is not in
    scope."""

    name: str
    heads: int
    times: tuple[float, float] | None


_256, _512 = (16, 16), (32, 32)
EMIGM = {
    # (channels, stride), width, depth, head depth, head width: bash/evaluate/evaluate_256.sh and models/emigm.py
    (_256, 448, 10, 3, 1024): Published("eMIGM-XS", 8, (0.1, 0.3)),
    (_256, 512, 12, 3, 1024): Published("eMIGM-S", 8, (0.1, 0.3)),
    (_256, 768, 12, 6, 1024): Published("eMIGM-B", 12, (0.1, 0.3)),
    (_256, 1024, 16, 8, 1280): Published("eMIGM-L", 16, (0.1, 0.3)),
    (_256, 1280, 20, 12, 1536): Published("eMIGM-H", 16, (0.2, 0.4)),
    (_512, 448, 10, 6, 1280): Published("eMIGM-XS at 512 px", 8, None),
    (_512, 512, 12, 6, 1280): Published("eMIGM-S at 512 px", 8, None),
    (_512, 768, 12, 8, 1280): Published("eMIGM-B at 512 px", 12, None),
    (_512, 1024, 16, 8, 1280): Published("eMIGM-L at 512 px", 16, None),
}
"""Sizes of 16x16 tokens that are published under one name; heads leave no trace in shapes, but these go with them."""


def official(state: Mapping[Any, Any], unread: Collection[str] = ()) -> Mapping[Any, Any]:
    """A state dict in MAR's own layout.

    eMIGM's null embedding and mask token are one parameter [1, D], which its state dicts have under both names. Where
    these differ, as beside EMA weights, the original's loading leaves the later name's values in it, and so does this.

    Args:
        unread: names that are left out.
    """
    found = {key: value for key, value in state.items() if key not in unread}
    if is_emigm(state):
        shared = state[_MASK] if _MASK in state else state[_NULL]
        found[_NULL], found[_MASK] = shared, shared[None]
    return found


def is_emigm(state: Mapping[Any, Any]) -> bool:
    """Whether the null embedding is the mask token, too."""
    null = shape_of(state, _NULL)
    return null is not None and len(null) == 2 and (_MASK not in state or shape_of(state, _MASK) == null)


def published(sizes: Mapping[str, Any]) -> tuple[Published, int] | None:
    """The published eMIGM of these sizes, and the stride of its VAE; None for others."""
    rest = tuple(sizes[name] for name in ("width", "depth", "head_depth", "head_width"))
    for latents in (_256, _512):
        if (sizes["token_channels"], sizes["tokens"], sizes["buffer"]) == (latents[0], 256, 64):
            model = EMIGM.get((latents, *rest))
            return (model, latents[1]) if model else None
    return None


def guidance_interval(times: tuple[float, float]) -> tuple[float, float]:
    """eMIGM's (t_min, t_max] as shares of known tokens.

    Its "exp" schedule leaves (1 - e^(-5 t)) / (1 - e^(-5)) of the tokens masked at time t, which runs from 1 to 0.
    """
    least, most = (round(1 - math.expm1(-5 * t) / math.expm1(-5), 3) for t in times)
    return most, least


def unconditional(state: Mapping[Any, Any], args: Mapping[Any, Any], told: bool) -> str:
    """Why a model has no classes; empty where it has some."""
    shape = shape_of(state, CLASSES)
    if told:
        return "--unconditional"
    if CLASSES not in state:
        return f"no {CLASSES}"
    if shape is not None and len(shape) == 2 and not shape[0]:
        return f"{CLASSES} has no row"
    dropped = args.get("label_drop_prob")
    if isinstance(dropped, int | float) and dropped == 1:
        return "args.label_drop_prob is 1: it has seen no label"
    return ""


def shape_of(state: Mapping[Any, Any], key: str) -> tuple[Any, ...] | None:
    """Of a tensor; None of what is none."""
    shape = getattr(state.get(key), "shape", None)  # of a Namespace it may be anything
    return tuple(shape) if isinstance(shape, tuple) else None
