"""The front door of the runtime: load a bundle, ask for pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.choice import open_backend, resolve_backend
from .backends.protocol import Backend
from .backends.row import BackendOptions
from .bundle.reader import Bundle
from .errors import UsageError
from .models.architecture import Architecture
from .models.conditioning import Conditioner, Request
from .sampling.chains import Floats, Integers
from .sampling.job import Observer, generation_job
from .sampling.loop import check_shape
from .sampling.named import named_plan
from .sampling.noise import NoiseSource, SeededNoise, checked_seed
from .sampling.noise_ahead import noise_ahead
from .sampling.plan import PlanSettings, SamplingPlan, resolve


@dataclass(frozen=True)
class Generation:
    """What :meth:`Pipeline.generate` returns, and :meth:`Pipeline.stream` yields.

    Attributes:
        pictures: uint8 [n, H, W, 3]; None where the model has no decoder.
        latents: float32 [n, L, C], tokens row by row.
        requests: what each image was asked to be; a class index where the model has classes.
        seeds: seed of each image.
        plan: what was run.
    """

    pictures: NDArray[np.uint8] | None
    latents: Floats
    requests: tuple[Request, ...]
    seeds: tuple[int, ...]
    plan: SamplingPlan

    @property
    def images(self) -> NDArray[np.uint8]:
        """The pictures, uint8 [n, H, W, 3].

        Raises:
            UsageError: the model has no decoder; ``latents`` are what it gives.
        """
        if self.pictures is None:
            raise UsageError("this model has no decoder and makes no images; take the latents")
        return self.pictures


class Pipeline:
    """A model ready to generate.

    Attributes:
        backend_why: why this backend was chosen, one line; None if the caller chose it.
    """

    def __init__(
        self,
        architecture: Architecture,
        conditioner: Conditioner,
        backend: Backend,
        plan_defaults: dict | None = None,
        max_batch: int = 8,
        backend_why: str | None = None,
    ) -> None:
        self.architecture = architecture
        self.conditioner = conditioner
        self.backend = backend
        self.plan_defaults = dict(plan_defaults or {})
        self.max_batch = max_batch
        self.backend_why = backend_why
        self._closed = False

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        backend: str = "auto",
        threads: int | None = None,
        checksums: bool = True,
        provider: str = "auto",
        device: int = 0,
        cuda_graph: str = "auto",
    ) -> Pipeline:
        """Opens a bundle with an engine library.

        Args:
            bundle: its folder, or a bundle already read.
            checksums: compare every file's SHA-256 with the manifest (sizes always are).
            backend, threads, provider, device, cuda_graph: see :class:`~.backends.BackendOptions`.

        Raises:
            BundleError: the bundle is not sound.
            BackendError: the engine library is unknown or missing, or refuses a graph.
            UsageError: options that do not go together.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.load(Path(bundle))
        options, why = resolve_backend(bundle, BackendOptions(backend, provider, threads, device, cuda_graph))
        engine = open_backend(bundle, options, checksums)
        return cls(bundle.architecture, bundle.conditioner, engine, dict(bundle.plan_defaults), bundle.max_batch, why)

    def warm_up(self, plan: str | PlanSettings | SamplingPlan = "gtr", batch_size: int | None = None) -> None:
        """Walks the plan's shapes once, so that no later generation waits for contexts, kernels or CUDA graphs.

        Backends that run one call at a time have nothing to prepare.

        Args:
            plan: see :meth:`plan`.
            batch_size: the bundle's ``max_batch`` by default.
        """
        self.backend.warm_up(self.plan(plan), self.max_batch if batch_size is None else batch_size)

    def close(self) -> None:
        """Gives a GPU's memory back; nothing works after this."""
        self.backend.close()
        self._closed = True

    def __repr__(self) -> str:
        return f"<Pipeline {self.architecture.name} on {self.backend.description}{', closed' * self._closed}>"

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def plan(self, plan: str | PlanSettings | SamplingPlan = "gtr", **changes: Any) -> SamplingPlan:
        """A plan by name, by settings, or as it is; what it leaves open comes from the model.

        Args:
            plan: a preset, a preset with changes such as ``"gtr:cfg=3,fts=none"``, a plan file, or settings.
            changes: fields of :class:`PlanSettings`, such as ``stage_steps=(4, 2, 1), cfg=3``.

        Raises:
            PlanError: unknown preset, or settings that do not fit the model.
        """
        if isinstance(plan, SamplingPlan):
            if changes:
                raise UsageError("a plan that is resolved already takes no changes; give its settings")
            return plan
        if isinstance(plan, str):
            return named_plan(plan, self.architecture, self.plan_defaults, changes)
        if not isinstance(plan, PlanSettings):
            raise UsageError(f"plan {plan!r} is neither a name nor settings")
        return resolve(replace(plan, **changes), self.architecture, self.plan_defaults)

    def generate(
        self,
        requests: Sequence[Request],
        seeds: Sequence[int] | None = None,
        plan: str | PlanSettings | SamplingPlan = "gtr",
        batch_size: int | None = None,
        noise: NoiseSource | None = None,
        orders: Integers | None = None,
        observer: Callable[[int], Observer | None] | None = None,
        finished: Callable[[int], None] | None = None,
    ) -> Generation:
        """Generates one image per request, and returns all of them together; :meth:`stream` keeps one batch only.

        Args:
            requests: what the images shall be: class indices where the model has classes.
            seeds: one per image; 0, 1, 2, ... by default. The same seed, request and plan give the same image, whatever
                else is generated with it.
            plan: see :meth:`plan`.
            batch_size: images per batch; the bundle's ``max_batch`` by default.
            noise: replaces the seeds' noise (recorded noise in tests); needs all images in one batch.
            orders: int64 [n, L], replaces the seeds' token orders.
            observer: called with the index of a batch's first image; what it returns is called after each AR step. A
                backend that runs whole generations is slower when it is watched.
            finished: called after each batch with the number of images made so far.

        Raises:
            UsageError: requests, seeds, sizes or the plan are out of range.
            BackendError: an engine fails, or gives values that are not finite.
        """
        resolved = self.plan(plan)
        for name, value in (("requests", requests), ("seeds", [] if seeds is None else seeds)):
            if isinstance(value, str) or not hasattr(value, "__len__"):
                raise UsageError(f"{name} are a list, one entry per image, not {value!r}")
        count = len(requests)
        if count == 0:
            raise UsageError("no requests: nothing to generate")
        asked = [self.conditioner.checked(request) for request in requests]
        seeds = list(range(count)) if seeds is None else [checked_seed(seed) for seed in seeds]
        if len(seeds) != count:
            raise UsageError(f"{len(seeds)} seeds for {count} images; give one seed per image")
        size = self._batch_size(batch_size)
        if noise is not None and size < count:
            raise UsageError(f"a noise source needs all {count} images in one batch, the batch size is {size}")
        if orders is not None and len(orders) != count:
            raise UsageError(f"{len(orders)} orders for {count} images; give one order per image")

        made = []
        starts = range(0, count, size)
        noises = itertools.repeat(noise) if noise is not None else self._noises(starts, seeds, resolved, orders)
        for start, source in zip(starts, noises, strict=False):
            part = slice(start, start + size)
            own = None if orders is None else orders[part]
            made.append(self._batch(asked[part], seeds[part], resolved, observer and observer(start), source, own))
            if finished is not None:
                finished(min(start + size, count))
        pictures = [batch.pictures for batch in made if batch.pictures is not None]
        latents = np.concatenate([batch.latents for batch in made])
        return Generation(np.concatenate(pictures) if pictures else None, latents, tuple(asked), tuple(seeds), resolved)

    def stream(
        self,
        requests: Iterable[Request],
        seeds: Iterable[int] | None = None,
        plan: str | PlanSettings | SamplingPlan = "gtr",
        batch_size: int | None = None,
        observer: Callable[[int], Observer | None] | None = None,
    ) -> Iterator[Generation]:
        """Generates one image per request, and yields them batch by batch: any number of images in constant memory.

        Nothing is read from ``requests`` and ``seeds`` before the batch that needs it; they may be generators without
        an end. Where both are sequences the noise of the next batch is drawn while a GPU works. The images are those
        of :meth:`generate`.

        Args:
            requests, seeds, plan, batch_size, observer: see :meth:`generate`.

        Yields:
            One :class:`Generation` per batch, of ``batch_size`` images; the last one may have fewer.

        Raises:
            UsageError: sizes or the plan are out of range (when this is called); requests or seeds are, or there are
                fewer seeds than requests (when their batch comes).
            BackendError: an engine fails, or gives values that are not finite.
        """
        resolved, size = self.plan(plan), self._batch_size(batch_size)
        numbers = itertools.count() if seeds is None else iter(seeds)

        def batches() -> Iterator[Generation]:
            rest, start = iter(requests), 0
            noises: Iterator[NoiseSource | None] = iter(())
            if isinstance(requests, Sequence) and isinstance(seeds, Sequence | None):
                known = range(len(requests)) if seeds is None else seeds
                noises = self._noises(range(0, len(requests), size), known, resolved, None)
            while asked := [self.conditioner.checked(request) for request in itertools.islice(rest, size)]:
                own = [checked_seed(seed) for seed in itertools.islice(numbers, len(asked))]
                if len(own) != len(asked):
                    raise UsageError(f"{start + len(own)} seeds for more images; give one seed per image")
                yield self._batch(asked, own, resolved, observer and observer(start), next(noises, None))
                start += len(asked)

        return batches()

    def _noises(
        self, starts: range, seeds: Sequence[int], plan: SamplingPlan, orders: Integers | None
    ) -> Iterator[NoiseSource | None]:
        """Of each batch, by the index of its first image, where it is worth being drawn ahead; else None."""
        parts = [slice(start, start + starts.step) for start in starts]
        if len(parts) < 2 or not self.backend.whole_generations:
            return itertools.repeat(None)
        batches = ((seeds[part], None if orders is None else orders[part]) for part in parts)
        return noise_ahead(batches, plan, self.architecture)

    def _batch_size(self, size: int | None) -> int:
        size = self.max_batch if size is None else size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"batch size {size!r} is not a whole number of at least 1")
        return size

    def _batch(
        self,
        asked: Sequence[Request],
        seeds: Sequence[int],
        plan: SamplingPlan,
        observer: Observer | None,
        noise: NoiseSource | None = None,
        orders: Integers | None = None,
    ) -> Generation:
        if self._closed:
            raise UsageError("this pipeline is closed; load the bundle again")
        arrays = self.conditioner.arrays(asked)
        noise = noise or SeededNoise(seeds, self.architecture.token_channels)
        latents = self.backend.generate(generation_job(plan, self.architecture, arrays, seeds, noise, orders), observer)
        images = None
        if self.architecture.decoder.makes_pictures:
            images = self.backend.decode(latents)
            check_shape("decoder", images.shape, (len(latents), *self.architecture.image_size, 3))
        return Generation(images, latents, tuple(asked), tuple(seeds), plan)
