"""Does a checkpoint bear MAR's own respacing of the diffusion timesteps, which always keeps t = 999?

There alpha_bar is 2.4e-9, so that the first reverse step multiplies any error of the predicted noise by hundreds. A
large, well-trained network predicts the noise there almost exactly; a small one does not, and its latents grow far
beyond what it was trained on. DiSA's cap at t = 950 avoids the place. The question is answered here with a few tokens
of one AR step, whose x_0 has about the same size under both settings if the checkpoint is sound. [ours]
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...runtime.backends.host_loop import HostLoopBackend
from ...runtime.models.architecture import Architecture
from ...runtime.models.conditioning import Conditioner
from ...runtime.sampling.chains import Floats, diffusion_chain
from ...runtime.sampling.noise import SeededNoise
from ...runtime.sampling.orders import generation_orders
from ...runtime.sampling.plan import PlanSettings, resolve

ORIGINAL, CAPPED = 999, 950
"""Largest kept timestep: MAR's respacing, and DiSA's cap."""
IMAGES, TOKENS, DIFFUSION_STEPS = 2, 8, 20
"""What is tried: the first tokens of so many images, in one AR step that knows nothing yet."""
LIMIT = 2.0
"""Ratio of sizes above which a checkpoint counts as sensitive. On mar-digits the ratio of t = 999 to 950 is in the
hundreds, and that of 975 or 990 to 950, which it bears, differs from 1 by less than 2 % (docs/parity.md)."""


@dataclass(frozen=True)
class Respacing:
    """What was measured.

    Attributes:
        original, capped: root mean square of the tokens x_0, kept timesteps up to 999 and up to 950.
        ratio: their quotient; infinite where the original's are not finite.
        sensitive: whether it is above :data:`LIMIT`.
    """

    original: float
    capped: float
    ratio: float
    sensitive: bool

    def to_json(self) -> dict[str, Any]:
        """For reports/parity.json; an infinite number as None."""
        found = {key: value if np.isfinite(value) else None for key, value in asdict(self).items()}
        return {**found, "limit": LIMIT, "timesteps": [ORIGINAL, CAPPED]}

    def warning(self, max_timestep: int) -> str | None:
        """One line for people, if the checkpoint is sensitive; ``max_timestep`` is what its plans keep by default."""
        if not self.sensitive:
            return None
        advice = "leave it so" if max_timestep <= CAPPED else f"give plans --max-timestep {CAPPED}"
        return (
            f"this checkpoint is sensitive to the respacing: with t = {ORIGINAL} kept its tokens are "
            f"{self.ratio:.3g} times as large as with t up to {CAPPED}; "
            f"its plans keep timesteps up to {max_timestep} by default: {advice}"
        )


def measure_respacing(backend: HostLoopBackend, architecture: Architecture, conditioner: Conditioner) -> Respacing:
    """Both settings on the same tokens and the same noise, without guidance.

    Takes one call of the backbone for two images and two chains of 20 steps over 16 tokens.
    """
    sizes = []
    tokens = min(TOKENS, architecture.tokens)
    seeds = list(range(IMAGES))
    orders = generation_orders("random", architecture.grid, 1, "odd", seeds)
    settings = PlanSettings(
        "respacing", (1,), order="random", generation_diffusion=(DIFFUSION_STEPS, DIFFUSION_STEPS), fts="none"
    )
    asked = {name: array[:1] for name, array in conditioner.arrays(conditioner.samples(IMAGES)).items()}
    predict, context = np.ascontiguousarray(orders[:, :tokens]), np.ascontiguousarray(orders[:, tokens:])
    nothing = np.zeros((IMAGES, 0), dtype=np.int64)
    known = np.zeros((IMAGES, 0, architecture.token_channels), dtype=np.float32)
    z = backend.backbone(known, nothing, predict, context, asked)
    for largest in (ORIGINAL, CAPPED):
        plan = resolve(replace(settings, max_timestep=largest), architecture)
        step = replace(plan.steps[0], predicted=tokens, context=architecture.tokens - tokens)
        noise = SeededNoise(seeds, architecture.token_channels)
        chain = diffusion_chain(step, plan.settings, predict, np.zeros(predict.shape, dtype=bool), noise)
        sizes.append(_size(backend.denoise(z, chain)))
    original, capped = sizes
    ratio = original / capped if np.isfinite(original) and capped > 0 else float("inf")
    return Respacing(original, capped, ratio, not ratio <= LIMIT)


def _size(tokens: Floats) -> float:
    """Root mean square in float64."""
    return float(np.sqrt(np.mean(np.square(tokens, dtype=np.float64))))
