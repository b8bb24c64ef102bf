"""What tests of class-conditional generations share: the known models' sizes, and one batch on a backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gtr_deploy.runtime.backends.protocol import Backend
from gtr_deploy.runtime.models.families import known_models
from gtr_deploy.runtime.models.mar import MarArchitecture
from gtr_deploy.runtime.sampling.chains import Floats, Integers
from gtr_deploy.runtime.sampling.job import Observer, generation_job
from gtr_deploy.runtime.sampling.noise import NoiseSource
from gtr_deploy.runtime.sampling.plan import SamplingPlan

ARCHITECTURES: dict[str, MarArchitecture] = {
    name: model.architecture
    for name, model in known_models().items()
    if isinstance(model.architecture, MarArchitecture)
}
PLAN_DEFAULTS = {name: model.plan_defaults for name, model in known_models().items()}


def class_labels(labels: Sequence[int], classes: int) -> dict[str, Integers]:
    """The backbone's conditioning: the labels, and the null label of ``classes`` classes."""
    return {"labels": np.array([labels, [classes] * len(labels)], dtype=np.int64)}


def sample(
    backend: Backend,
    plan: SamplingPlan,
    architecture: MarArchitecture,
    labels: Sequence[int],
    seeds: Sequence[int],
    noise: NoiseSource,
    orders: Integers | None = None,
    observer: Observer | None = None,
) -> Floats:
    """One batch of latents [B, L, C]."""
    asked = class_labels(labels, architecture.classes)
    return backend.generate(generation_job(plan, architecture, asked, seeds, noise, orders), observer)
