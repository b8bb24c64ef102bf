"""The command-line options that say what the images shall be: one per family that can be asked for something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from ..errors import UsageError
from ..models.conditioning import Conditioner, Request
from ..models.families import FAMILIES
from .option_groups import given, with_options


@dataclass(frozen=True)
class RequestOptions:
    """What was typed.

    Attributes:
        texts: option to its value.
        images: images of each request.
    """

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
    known = {family.conditioner.option for family in FAMILIES.values()} - {None}
    options = {
        f"request_{row.option.removeprefix('--')}": click.option(
            row.option, f"request_{row.option.removeprefix('--')}", help=row.help
        )
        for row in sorted(row for row in known if row)
    }
    several = click.option(
        "--images-per-class",
        "--images",
        "images",
        type=click.IntRange(1, 100_000),
        default=1,
        show_default=True,
        help="Of each request.",
    )

    def gather(values: dict[str, Any]) -> dict[str, Any]:
        texts = {f"--{name}": text for name, text in given(values, "request_").items() if name != "images"}
        return {"requests": RequestOptions(texts, values["images"])}

    return with_options(command, {**options, "images": several}, gather)
