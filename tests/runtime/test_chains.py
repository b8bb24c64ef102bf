"""A diffusion chain, row by row, against a plain computation of every token's own reverse steps."""

from __future__ import annotations

import numpy as np
import pytest

from gtr_deploy.runtime.sampling.chains import diffusion_chain
from gtr_deploy.runtime.sampling.diffusion import reverse_process
from gtr_deploy.runtime.sampling.noise import SeededNoise
from gtr_deploy.runtime.sampling.plan import ARStep, PlanSettings

SETTINGS = PlanSettings("chains", (1,), max_timestep=950, temperature=0.9)


@pytest.mark.parametrize("images", [2, 60])  # 60 images have more rows than the tables that are kept
@pytest.mark.parametrize(
    ("plain", "refined_count", "refined_steps"),
    [(4, 2, 8), (8, 2, 4), (4, 2, 4), (4, 0, 0), (4, 6, 8)],
    ids=["refined longer", "refined shorter", "equal", "none", "all"],
)
def test_a_chain_is_every_tokens_own(plain: int, refined_count: int, refined_steps: int, images: int) -> None:
    """Row by row: the segments that it takes part in are the reverse process of its own length, with its own noise."""
    predict = np.argsort(np.random.default_rng(0).random((images, 6)), axis=1)
    refined = np.zeros((images, 6), dtype=bool)
    refined[:, :refined_count] = True
    noise = SeededNoise(range(images), 3)
    step = ARStep(30, 2, 0, 6, 0, plain, refined_count, refined_steps, 2.5, 2, 0, 0)
    chain = diffusion_chain(step, SETTINGS, predict, refined, noise)
    assert sorted(chain.rows.tolist()) == list(range(images * 6))
    assert (chain.guidance == np.float32(2.5)).all()
    for place, row in enumerate(chain.rows.tolist()):
        image, token = divmod(row, 6)
        count = refined_steps if refined[image, token] else plain
        process = reverse_process(count, SETTINGS.max_timestep, SETTINGS.temperature)
        mine = [segment for segment in chain.segments if place < segment.rows]
        assert np.concatenate([s.timesteps[:, place] for s in mine]).tolist() == process.timesteps.tolist()
        assert np.array_equal(np.concatenate([s.coefficients[:, place] for s in mine]), process.coefficients)
        (drawn,) = noise.draw(np.array([image]), predict[image, [token]], count)
        assert np.array_equal(chain.x[place], drawn[0])
        assert np.array_equal(np.concatenate([s.noise[:, place] for s in mine]), drawn[1:])
