"""The command-line options that say what the images shall be, one per family that can be asked for something; and
what a picture says of how it was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from ..bundle.reader import Bundle
from ..errors import UsageError
from ..models.conditioning import Conditioner, Request
from ..models.families import FAMILIES
from ..sampling.plan import SamplingPlan
from .option_groups import given, with_options


@dataclass(frozen=True)
class RequestOptions:
    """What was typed: option to its value, and the images of each request."""

    texts: Mapping[str, str]
    images: int

    def parsed(self, conditioner: Conditioner) -> list[Request]:
        """The requests.

        Raises:
            UsageError: the model cannot be asked this way, or nothing was asked.
        """
        wanted = conditioner.option.option if conditioner.option else None
        if others := [option for option in self.texts if option != wanted]:
            instead = f"give {wanted}" if wanted else "leave it out"
            raise UsageError(f"{', '.join(others)}: this model takes no such request; {instead}")
        if wanted is None:
            return conditioner.samples(1)
        if wanted not in self.texts:
            raise UsageError(f"Missing option '{wanted}'.")
        return conditioner.parse(self.texts[wanted])


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds every family's option, and ``--images-per-class``; the command gets ``requests``."""
    rows = sorted({row for family in FAMILIES.values() if (row := family.conditioner.option)})
    names = [f"request_{row.option.removeprefix('--')}" for row in rows]
    options = {name: click.option(row.option, name, help=row.help) for name, row in zip(names, rows, strict=True)}
    names, count = ("--images-per-class", "--images", "images"), click.IntRange(1, 100_000)
    several = click.option(*names, type=count, default=1, show_default=True, help="Of each request.")

    def gather(values: dict[str, Any]) -> dict[str, Any]:
        texts = {f"--{name}": text for name, text in given(values, "request_").items() if name != "images"}
        return {"requests": RequestOptions(texts, values["images"])}

    return with_options(command, {**options, "images": several}, gather)


def image_settings(bundle: Bundle, backend: str, request: Request, seed: int, plan: SamplingPlan) -> dict[str, Any]:
    """What a picture's PNG says of how it was made: all that decides it."""
    return {
        "model": bundle.architecture.name,
        "bundle": bundle.digest,
        "precision": bundle.precision,
        "weights": bundle.manifest.source.label,
        "backend": backend,
        **bundle.conditioner.record(request),
        "seed": seed,
        "plan": plan.settings.to_json(),
    }
