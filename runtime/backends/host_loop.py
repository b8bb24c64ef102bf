"""The base of backends whose library runs one graph at a time: the sampler's loop runs on the host.

A backend needs ``run_graph`` alone; what its library can do better, such as keeping x in place, it overrides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.conditioning import Arrays
from ..sampling.chains import DiffusionChain, Floats, Integers, modulation_parts, modulation_rows
from ..sampling.job import GenerationJob, Observer
from ..sampling.loop import BackboneOutput, check_shape, generate_on_host
from ..sampling.plan import SamplingPlan
from .protocol import CallHook, hooked


def modulations(
    z: Floats, timesteps: Integers, call: Callable[[Mapping[str, NDArray[Any]]], Sequence[NDArray[Any]]]
) -> Iterator[Floats]:
    """Modulation [G, n, E] of each reverse step, good until the next one; the graph makes that of some at once.

    Args:
        z: float32 [G, n, D].
        timesteps: int64 [S, n].
        call: the modulation graph.
    """
    branches, n, width = z.shape
    own = np.ascontiguousarray(z).reshape(branches * n, width)
    for start, stop in modulation_parts(len(timesteps), branches * n):
        row, timestep = modulation_rows(timesteps[start:stop], branches)
        made = call({"z": own, "row": row, "timestep": timestep})[0]
        check_shape("modulation", made.shape, (len(row), *made.shape[1:2]))
        yield from made.reshape(stop - start, branches, n, -1)


class HostLoopBackend(ABC):
    """See :class:`~.protocol.Backend`."""

    name: str
    hook: CallHook | None = None
    whole_generations = False
    calling: tuple[str, float] | None = None
    """Kind of the graph that is being called, and since when (``time.monotonic``)."""

    @abstractmethod
    def run_graph(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """See :meth:`~.protocol.Backend.run`; no hook."""

    @property
    def description(self) -> str:
        return self.name

    def generate(self, job: GenerationJob, observer: Observer | None = None) -> Floats:
        return generate_on_host(self, job, observer)

    def warm_up(self, plan: SamplingPlan, batch: int) -> None:  # noqa: B027 - most libraries have nothing to prepare
        """Nothing to prepare."""

    def close(self) -> None:  # noqa: B027 - nor to give back
        """Nothing to give back."""

    def run(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        return hooked(self.hook, kind, inputs, lambda: self.run_graph(kind, inputs))

    def backbone(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, conditioning: Arrays
    ) -> BackboneOutput:
        inputs = {"tokens": tokens, "visible": visible, "predict": predict, "context": context, **conditioning}
        z = self.run("backbone", inputs)[0]
        return BackboneOutput(z.shape, z)

    def detail(self, z: BackboneOutput) -> tuple[Floats, Floats]:
        score, norm = self.run("detail_score", {"z": z.value[0]})
        return score, norm

    def denoise(self, z: BackboneOutput, chain: DiffusionChain) -> Floats:
        branches, batch, predicted, width = z.shape
        sorted_z = z.value.reshape(branches, batch * predicted, width)[:, chain.rows]
        x = chain.x.copy()
        call = self.run if self.hook else self.run_graph  # a thousand calls an image
        for segment in chain.segments:
            n = segment.rows
            inputs = {"x": x[:n], "guidance": chain.guidance[:n]}
            made = modulations(sorted_z[:, :n], segment.timesteps, partial(call, "modulation"))
            for index, inputs["modulation"] in enumerate(made):
                inputs["coefficients"] = segment.coefficients[index]
                inputs["noise"] = segment.noise[index]
                x_next = call("diffusion_step", inputs)[0]
                check_shape("diffusion_step", x_next.shape, inputs["x"].shape)
                inputs["x"] = x_next
            x[:n] = inputs["x"]
        return x

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        return self.run("decoder", {"latents": latents})[0]
