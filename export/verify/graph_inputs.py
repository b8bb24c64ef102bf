"""What graphs are called with when they are checked: realistic inputs, at sizes that an engine's profiles hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...runtime.bundle.engine_sets import EngineSet
from ...runtime.bundle.reader import Bundle
from ...runtime.errors import BackendError
from ...runtime.models.architecture import Architecture
from ...runtime.models.conditioning import Conditioner
from ...runtime.models.families import family_of
from ...runtime.models.graphs import GraphSpec
from ...runtime.sampling.diffusion import reverse_process
from ...runtime.sampling.plan import SamplingPlan, preset, presets_of, resolve
from ...runtime.sampling.shapes import Sizes, call_shapes, covering

_SPREAD = {"modulation": np.float32(0.4)}
"""Standard deviations that are not about 1: that of a trained head's modulation."""


def graph_inputs(
    spec: GraphSpec, architecture: Architecture, conditioner: Conditioner, sizes: Mapping[str, int], seed: int = 0
) -> dict[str, Any]:
    """Inputs as a generation would give them: positions that partition the grid, coefficients of a real respacing."""
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(architecture.tokens) for _ in range(sizes.get("B", 1))])
    known, predicted = sizes.get("V", 0), sizes.get("P", 0)
    process = reverse_process(25, 950)
    steps = rng.integers(0, process.steps, sizes.get("T", sizes.get("N", 1)))
    batch, rows, longer, common = (sizes.get(letter, 1) for letter in "BNMS")
    special = {
        "row": np.arange(sizes.get("T", 1)) % sizes.get("Q", 1),
        "positions": order[:, :predicted],
        "row_index": np.arange(batch * predicted).reshape(batch, predicted) if "K" in spec.symbols else np.arange(rows),
        "ranks": np.stack([rng.permutation(max(predicted, 1))[: sizes.get("K", 1)] for _ in range(batch)]),
        "rows": rng.permutation(rows)[:longer],
        "slot_index": np.arange(longer),
        "timestep_short": rng.integers(0, 1000, common),
        "timestep_long": rng.integers(0, 1000, common),
        "direction": np.ones(1, np.float32),
        "visible": order[:, :known],
        "predict": order[:, known : known + predicted],
        "context": order[:, known + predicted : known + predicted + sizes.get("R", 0)],
        **conditioner.example(rng, sizes),
        "timestep": process.timesteps[steps],
        "coefficients": process.coefficients[steps],
        "guidance": rng.uniform(1.0, 3.0, sizes.get("N", 1)).astype(np.float32),
    }
    return {
        t.name: np.ascontiguousarray(special[t.name])
        if t.name in special
        else _SPREAD.get(t.name, np.float32(1)) * rng.standard_normal(t.shape(sizes)).astype(np.float32)
        for t in spec.inputs
    }


def covered_specs(specs: Mapping[str, GraphSpec], bundle: Bundle, engines: EngineSet) -> dict[str, GraphSpec]:
    """The graphs with the smallest, a usual and the largest sizes among those that presets ask of these engines.

    Raises:
        BackendError: the engines hold no preset's shapes.
    """
    found: dict[str, list[Sizes]] = {kind: [] for kind in specs}
    for name in covered_presets(bundle, engines):
        for batch in (1, engines.max_batch):
            for kind, shapes in call_shapes(_plan(bundle, name), batch).items():
                found[kind] += shapes
    result = {}
    for kind, spec in specs.items():
        shapes = sorted(
            found[kind],
            key=lambda sizes: (sizes.get("B", 1) * sizes.get("N", 1) * sizes.get("T", 1), tuple(sizes.values())),
        )
        if not shapes:  # a row graph that no covered plan calls
            least, best, most = (
                {letter: sizes[i] for letter, sizes in engines.graphs[kind].profiles[0].items()} for i in range(3)
            )
            result[kind] = replace(spec, smallest=least, usual=best, largest=most)
        else:
            middle = shapes[len(shapes) // 2]
            result[kind] = replace(spec, smallest=shapes[0], usual=middle, largest=shapes[-1])
    return result


def covered_presets(bundle: Bundle, engines: EngineSet) -> list[str]:
    """Presets whose every shape the engines hold, for one image and for the largest batch.

    Raises:
        BackendError: there is none.
    """
    names = [name for name in presets_of(family_of(bundle.architecture)) if _covered(_plan(bundle, name), engines)]
    if not names:
        raise BackendError(f"the engines {engines.key} hold no preset's shapes, so nothing can be compared")
    return names


def _covered(plan: SamplingPlan, engines: EngineSet) -> bool:
    return all(
        covering(engines.graphs[kind].profiles, sizes) is not None
        for batch in (1, engines.max_batch)
        for kind, shapes in call_shapes(plan, batch).items()
        for sizes in shapes
    )


def _plan(bundle: Bundle, name: str) -> SamplingPlan:
    return resolve(preset(name, bundle.architecture, bundle.plan_defaults), bundle.architecture)
