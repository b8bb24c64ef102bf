"""The folder of a run: what its pictures are called, what run.json says of it, and which of them are there already.

A folder may hold several runs. Their pictures do not meet, because a picture's name has what was asked, the plan with
whatever differs from the preset, and the seed; what a name has no room for, such as the bundle, is in the picture's
settings, and these are compared before anything is written. Knows no backend and generates nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.reader import Bundle
from ..errors import GtrError, PlanError, UsageError, printable
from ..files import read_json, sweep, write_json
from ..models.conditioning import Request
from ..pictures.png import is_whole, read_pixels, read_settings, save_png
from ..sampling.plan import SamplingPlan, preset
from .latents import has_latents, read_latents_settings, save_latents
from .request_options import image_settings

LAYOUTS = ("flat", "class")
_LONGEST_VARIANT = 60
_NOT_COMPARED = ("versions",)


@dataclass(frozen=True)
class Run:
    """What one command line asks for, and where it goes.

    Attributes:
        backend: the engine library's name.
        requests, each: pictures of each request; picture n of the whole run is of request n // each and has the seed
            ``seed + n``.
        layout: ``flat``, or ``class`` for a folder per request.
        shard: (I, N): of the whole run this machine makes picture I - 1 and every N-th after it.
    """

    bundle: Bundle
    backend: str
    plan: SamplingPlan
    requests: Sequence[Request]
    each: int
    seed: int
    out: Path
    layout: str = "flat"
    shard: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        """UsageError unless the shard has a picture."""
        part, parts = self.shard
        if not 1 <= part <= parts:
            raise UsageError(f"--shard {part}/{parts}: the first number is one of 1 to {parts}")
        if not self.numbers:
            raise UsageError(f"--shard {part}/{parts}: nothing is left for it of {self._total} pictures")

    @cached_property
    def numbers(self) -> range:
        """The pictures of this shard, as they are numbered in the whole run."""
        return range(self.shard[0] - 1, self._total, self.shard[1])

    @property
    def _total(self) -> int:
        return len(self.requests) * self.each

    def batches(self, size: int) -> Iterator[range]:
        """The shard's numbers, in parts of ``size``."""
        return (self.numbers[start : start + size] for start in range(0, len(self.numbers), size))

    def request(self, number: int) -> Request:
        """What a picture is asked to be."""
        return self.requests[number // self.each]

    def seed_of(self, number: int) -> int:
        """A picture's seed."""
        return self.seed + number

    def file(self, number: int) -> Path:
        """Where a picture lies; names sort as requests and seeds do, up to seed 999999."""
        # The same bytes wherever: where a locale knows no UTF-8, they stand for themselves.
        stem = os.fsdecode(self.bundle.conditioner.stem(self.request(number)).encode())
        separator = "/" if self.layout == "class" else "-"
        suffix = "png" if self._draws else "npz"
        return self.out / f"{stem}{separator}{self.variant}-seed{self.seed_of(number):06d}.{suffix}"

    @property
    def _draws(self) -> bool:
        """Whether images are pictures; else they are latents in NPZ files."""
        return self.bundle.architecture.decoder.makes_pictures

    @cached_property
    def variant(self) -> str:
        """The plan, and what differs from its preset on this model: ``gtr``, ``gtr-cfg2``; a digest where that is
        long, or no name of ours."""
        settings = self.plan.settings.to_json()
        name = settings.pop("name").partition(":")[0]  # gtr of gtr:cfg=3
        try:
            usual = preset(name, self.bundle.architecture, self.bundle.plan_defaults).to_json()
        except PlanError:
            usual = {}
        changed = {key: value for key, value in settings.items() if usual.get(key) != value}
        words = [name, *(f"{key.replace('_', '')}{_word(value)}" for key, value in changed.items())]
        text = "-".join(words)
        if len(text) <= _LONGEST_VARIANT and re.fullmatch(r"[A-Za-z0-9][\w.+-]*", text, re.ASCII):
            return text
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return f"{name if usual else 'plan'}-{digest}"

    def settings(self, number: int) -> dict[str, Any]:
        """What decides a picture, for its PNG."""
        request, seed = self.request(number), self.seed_of(number)
        return image_settings(self.bundle, self.backend, request, seed, self.plan)

    def listed(self, number: int) -> dict[str, Any]:
        """What --json says of a picture."""
        record = self.bundle.conditioner.record(self.request(number))
        return {"file": str(self.file(number)), **record, "seed": self.seed_of(number)}

    @cached_property
    def record(self) -> dict[str, Any]:
        """What run.json says."""
        return {
            "model": self.bundle.architecture.name,
            "bundle": self.bundle.digest,
            "precision": self.bundle.precision,
            "backend": self.backend,
            "plan": self.plan.settings.to_json(),
            "requests": [self.bundle.conditioner.record(request) for request in self.requests],
            "images_per_request": self.each,
            "seeds": {"first": self.seed, "last": self.seed + self._total - 1},
            "layout": self.layout,
            "shard": "/".join(map(str, self.shard)),
            "versions": {"gtr-deploy": version("gtr-deploy"), "numpy": np.__version__},
        }

    def place(self, resume: bool) -> Path:
        """Looks at what the folder holds; where this run's record is, or shall be: run.json, or run-2.json and so on
        beside the records of other runs. Changes nothing.

        Raises:
            GtrError: the folder holds pictures that this run would write over, or, with ``resume``, another run.
        """
        if not resume:
            self._refuse_pictures()
        mine, others, path = None, [], self.out / "run.json"
        for number in itertools.count(2):
            if not path.is_file():
                break
            there = read_json(path)
            found = [difference(there, self.record, key) for key in self.record if key not in _NOT_COMPARED]
            if not any(found):
                mine = path
            others.append(([text for text in found if text and not text.startswith("shard")], path))
            path = self.out / f"run-{number}.json"
        if mine is None and resume and others and all(differences for differences, _ in others):
            differences, nearest = min(others, key=lambda pair: len(pair[0]))
            raise GtrError(
                f"{nearest} is another run: {differences[0]}; give another --out, or no --resume to add this run to it"
            )
        return mine or path

    def begin(self, record: Path) -> None:
        """Writes the record, before anything else, where :meth:`place` found that it shall be, and clears away what
        killed processes have left."""
        for folder in {self.out, *(self.file(number).parent for number in self.numbers)}:
            sweep(folder)
        if not record.is_file():
            write_json(record, self.record)

    def _refuse_pictures(self) -> None:
        there = [number for number in self.numbers if self.file(number).exists()] if self.out.is_dir() else []
        if not there:
            return
        first = self.file(there[0])
        if self._is_whole(first):
            self._check(there[0])
        count = f"{len(there)} of {len(self.numbers)} pictures of this run are in {self.out} already"
        raise GtrError(f"{count}; --resume makes what is missing, another --out makes all of them anew")

    def has(self, number: int) -> bool:
        """Whether a picture is there, whole.

        Raises:
            GtrError: another picture has its name.
        """
        if not self._is_whole(self.file(number)):
            return False
        self._check(number)
        return True

    def _is_whole(self, file: Path) -> bool:
        return is_whole(file) if self._draws else has_latents(file)

    def _check(self, number: int) -> None:
        file = self.file(number)
        settings = read_settings(file) if self._draws else read_latents_settings(file)
        found = difference(settings, self.settings(number))
        if found:
            raise GtrError(f"{file} is a picture of another run: {found}; give another --out")

    def save(self, number: int, image: NDArray[Any]) -> None:
        """Writes a picture [H, W, 3], or latents [L, C] where there is no decoder.

        Raises:
            GtrError: it cannot be written.
        """
        (save_png if self._draws else save_latents)(self.file(number), image, self.settings(number))

    def pixels(self) -> NDArray[np.uint8]:
        """All pictures of the shard, read back [n, H, W, 3]."""
        return np.stack([read_pixels(self.file(number)) for number in self.numbers])


def difference(there: Any, here: Any, key: str | None = None) -> str | None:
    """The first of our values that is another one there, with both: ``plan.cfg is 3.0 there and 2.0 here``; None where
    all are the same. Of a list the lengths, where these differ.

    Args:
        key: looks at this one of the values only.
    """
    place: list[str] = []
    if key is not None:
        there, here, place = there.get(key) if isinstance(there, Mapping) else None, here[key], [key]
    while there != here:
        keys: Any = ()
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            keys = [name for name in here if there.get(name) != here[name]]
            if not keys:
                return None  # it says more than we do
            there, here = there.get(keys[0]), here[keys[0]]
        elif isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
            keys = [str(index) for index, pair in enumerate(zip(there, here, strict=True)) if pair[0] != pair[1]]
            there, here = there[int(keys[0])], here[int(keys[0])]
        else:
            long = isinstance(here, list) and isinstance(there, list) and max(len(here), len(there)) > 4
            there, here = (f"{len(there)} long", f"{len(here)} long") if long else (_shown(there), _shown(here))
            return f"{printable('.'.join(place))} is {there} there and {here} here"
        place.append(keys[0])
    return None


def _shown(value: Any) -> str:
    """A digest's beginning tells it from others."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:12]}…"
    return "missing" if value is None else printable(value if isinstance(value, str) else json.dumps(value), 60)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
