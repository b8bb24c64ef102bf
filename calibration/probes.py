"""How far a quantised graph is from its float original: on inputs recorded along a real generation, and in images.

The head is asked for eps itself: with coefficients that pass nothing else, the reverse step's output is minus the
guided noise that the head predicts, without a change to the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from ..runtime.backends.protocol import GraphCall
from ..runtime.errors import BackendError
from ..runtime.models.architecture import Architecture
from ..runtime.models.graphs import COEFFICIENTS
from ..runtime.sampling.chains import Floats
from ..runtime.sampling.diffusion import cosine_betas
from ..runtime.sampling.job import GenerationJob, generation_job
from ..runtime.sampling.noise import SeededNoise
from ..runtime.sampling.plan import SamplingPlan
from .data import CalibrationImages
from .layers import QUANTISED_KINDS

#: x0 = 0 x - 1 eps; x_next = 1 x0 + 0 x + no noise.
_ONLY_EPS = {"sqrt_recipm1_alpha_bar": 1.0, "posterior_mean_x0": 1.0}

OUTPUTS = {"backbone": "backbone", "modulation": "diffusion_step", "diffusion_step": "diffusion_step"}
"""Graph kind to the kind whose output tells its error: modulation counts by the eps that it makes."""

Call = dict[str, NDArray[Any]]

AR_STEPS, CALLS = 6, 5
"""AR steps that calls are kept of, and reverse steps of each of them; both evenly spread over what there is."""


@dataclass(frozen=True)
class Probes:
    """Recorded inputs and what the float graphs make of them.

    Attributes:
        inputs: kind of output to the inputs of a few calls, spread over AR steps and diffusion timesteps; those of the
            head are the modulation graph's and the reverse step's together.
        expected: kind of output to what the float graphs give: z [G, B, P, D], guided eps [N, C].
        timesteps: largest diffusion timestep of each call of the head.
        images: that they come from.
        latents: float32 [n, L, C], the float graphs' images.
    """

    inputs: dict[str, list[Call]]
    expected: dict[str, list[Floats]]
    timesteps: tuple[int, ...]
    images: CalibrationImages
    latents: Floats

    def error(self, kind: str, found: Sequence[Floats]) -> float:
        """Relative error of outputs of one of :data:`OUTPUTS`.

        The head's rows count with their noise level sqrt(1 - alpha_bar), which is how far an error of eps moves a
        token: at t = 0 the head's eps is ill-conditioned, and next to nothing depends on it.
        """
        if kind != "diffusion_step":
            return relative_error(found, self.expected[kind])
        level = np.sqrt(1 - np.cumprod(1 - cosine_betas()))
        weights = [level[call["timestep"][: len(call["x"])]][:, None] for call in self.inputs[kind]]
        weighted = ([a * weight for a, weight in zip(x, weights, strict=True)] for x in (found, self.expected[kind]))
        return relative_error(*weighted)

    def eps_errors(self, found: Sequence[Floats]) -> dict[int, float]:
        """Relative error of eps per recorded diffusion timestep, not weighted."""
        grouped: dict[int, list[tuple[Floats, Floats]]] = {}
        for timestep, output, wanted in zip(self.timesteps, found, self.expected["diffusion_step"], strict=True):
            grouped.setdefault(timestep, []).append((output, wanted))
        return {t: relative_error(*zip(*grouped[t], strict=True)) for t in sorted(grouped, reverse=True)}


class _Recorder:
    """Call hook that keeps the inputs of some calls."""

    def __init__(self, plan: SamplingPlan) -> None:
        self.inputs: dict[str, list[Call]] = {kind: [] for kind in OUTPUTS.values()}
        self._ar_step, self._call = -1, 0
        self._modulation: Call = {}
        self._first = 0
        #: AR step to the reverse steps of it that are kept.
        self._wanted = {i: _spread(plan.steps[i].head_calls, CALLS) for i in _spread(len(plan.steps), AR_STEPS)}

    def __call__(self, call: GraphCall) -> None:
        given = dict(call.inputs)
        if call.kind == "backbone":
            self._ar_step, self._call = self._ar_step + 1, 0
            wanted = self._ar_step in self._wanted
        elif call.kind == "modulation":
            self._modulation, self._first = given, self._call
            return
        elif call.kind == "diffusion_step":
            wanted = self._call in self._wanted.get(self._ar_step, ())
            branches, rows, _ = given.pop("modulation").shape
            own = slice(*(branches * rows * (self._call - self._first + i) for i in (0, 1)))
            made = self._modulation
            given = {**given, "z": made["z"], "row": made["row"][own], "timestep": made["timestep"][own]}
            self._call += 1
        else:
            return
        if wanted:
            self.inputs[call.kind].append({name: np.array(value) for name, value in given.items()})


def _spread(total: int, count: int) -> list[int]:
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist()


def record(
    architecture: Architecture,
    graphs: Mapping[str, Path],
    plan: SamplingPlan,
    images: CalibrationImages,
    threads: int | None = None,
) -> Probes:
    """Generates the images, one batch, with the float graphs and keeps some calls."""
    backend = OnnxRuntimeBackend({kind: graphs[kind] for kind in (*QUANTISED_KINDS, "detail_score")}, threads)
    recorder = backend.hook = _Recorder(plan)
    latents = backend.generate(_job(architecture, plan, images))
    for call in recorder.inputs["diffusion_step"]:
        call["coefficients"] = np.zeros_like(call["coefficients"])
        for name, value in _ONLY_EPS.items():
            call["coefficients"][:, COEFFICIENTS.index(name)] = value
    expected = {kind: outputs(graphs, kind, calls, threads) for kind, calls in recorder.inputs.items()}
    timesteps = tuple(int(call["timestep"].max()) for call in recorder.inputs["diffusion_step"])
    return Probes(recorder.inputs, expected, timesteps, images, latents)


def _job(architecture: Architecture, plan: SamplingPlan, images: CalibrationImages) -> GenerationJob:
    noise = SeededNoise(images.seeds, architecture.token_channels)
    return generation_job(plan, architecture, images.conditioning, images.seeds, noise)


def outputs(
    graphs: Mapping[str, Path], kind: str, calls: Sequence[Call], threads: int | None = None, optimised: bool = True
) -> list[Floats]:
    """First output of each call of one of :data:`OUTPUTS`.

    Args:
        optimised: False leaves ONNX Runtime's graph optimisations out, without which it has no E4M3 products.
    """
    used = {name: path for name, path in graphs.items() if OUTPUTS.get(name, name) == kind}
    backend = OnnxRuntimeBackend(used, threads, optimised=optimised)
    found = []
    for call in calls:
        given = dict(call)
        if "modulation" in used:
            (made,) = backend.run("modulation", {name: given.pop(name) for name in ("z", "row", "timestep")})
            given["modulation"] = made.reshape(-1, len(given["x"]), made.shape[1])
        found.append(backend.run(kind, given)[0])
    return found


def relative_error(found: Sequence[Floats], expected: Sequence[Floats]) -> float:
    """Norm of all differences over norm of all expected values; infinite where a value is not finite."""
    difference = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(found, expected, strict=True))
    norm = sum(float(np.square(b.astype(np.float64)).sum()) for b in expected)
    error = float(np.sqrt(difference / max(norm, 1e-30)))
    return error if np.isfinite(error) else float("inf")


def image_errors(
    architecture: Architecture, backend: OnnxRuntimeBackend, plan: SamplingPlan, probes: Probes
) -> NDArray[np.float64]:
    """Relative error of each image's latents against the float graphs' [n]; infinite where the chain overflowed."""
    try:
        found = backend.generate(_job(architecture, plan, probes.images))
    except BackendError as error:
        if "not finite" not in str(error):
            raise
        return np.full(len(probes.latents), np.inf)
    difference = np.linalg.norm((found - probes.latents).reshape(len(found), -1).astype(np.float64), axis=1)
    return difference / np.linalg.norm(probes.latents.reshape(len(found), -1), axis=1)
