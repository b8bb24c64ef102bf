"""What gtr-export asks and says of models of one's own: the options of build, and inspect on a checkpoint."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..runtime.commands.console import echo, print_json, print_table
from ..runtime.commands.option_groups import given, with_options
from ..runtime.errors import UsageError
from .build.told import DECODERS


class _Grid(click.ParamType):
    """``16x24`` is 16 rows of 24 tokens."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        sides = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", value)
        if not sides:
            self.fail(f"{value!r} is not rows x columns such as 16x24", param)
        return int(sides[1]), int(sides[2])


_SIZE = click.IntRange(1, 1024)
_OPTIONS = {
    "own_name": click.option("--name", "own_name", help="Own model: what to call it (default: the file's name)."),
    "own_heads": click.option("--heads", "own_heads", type=_SIZE, help="Own model: attention heads, if no args."),
    "own_patch_size": click.option(
        "--patch-size", "own_patch_size", type=_SIZE, help="Own model: latent cells or pixels along a token's side."
    ),
    "own_grid": click.option("--grid", "own_grid", type=_Grid(), help="Own model: rows and columns of tokens."),
    "own_decoder": click.option(
        "--decoder",
        "own_decoder",
        type=click.Choice(DECODERS),
        help="Own model: a VAE (--vae), squares of grey or RGB pixels, or latents only; if nothing else says it.",
    ),
    "no_decoder": click.option("--no-decoder", is_flag=True, help="Any model: the bundle gives latents, no pictures."),
    "own_latent_scale": click.option(
        "--latent-scale",
        "own_latent_scale",
        type=float,
        metavar="X",
        help="Own model: what the VAE's latents were multiplied by; without it that of the VAE's config.json.",
    ),
    "own_latent_shift": click.option(
        "--latent-shift",
        "own_latent_shift",
        type=float,
        metavar="X",
        help="Own model: what was subtracted from them before; the VAE decodes latents / scale + shift.",
    ),
    "own_unconditional": click.option(
        "--unconditional",
        "own_unconditional",
        is_flag=True,
        default=None,
        help="Own model: leaves its classes out; found by itself where the file has none.",
    ),
    "class_names": click.option(
        "--class-names",
        "class_names",
        type=click.Path(path_type=Path),
        help="Names of the classes: one a line, or JSON; the word imagenet stands for ImageNet's.",
    ),
}


def own_model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the command gets ``own``, those that were typed, and ``class_names``."""

    def gather(values: dict[str, Any]) -> dict[str, Any]:
        class_names, without = values.pop("class_names"), values.pop("no_decoder")
        own = given(values, "own_")
        if without:
            if own.get("decoder", "none") != "none":
                raise UsageError(f"--no-decoder and --decoder {own['decoder']} contradict each other; give one of them")
            own["decoder"] = "none"
        return {"class_names": class_names, "own": own}

    return with_options(command, _OPTIONS, gather)


def inspect_checkpoint(path: Path, as_json: bool) -> None:
    """Prints which model a checkpoint is of, what says so, and the command that builds it.

    Raises:
        GtrError: it is no MAR checkpoint in the official layout, or contradicts itself.
    """
    from .build.inference import shown
    from .build.own_model import findings
    from .build.told import Told

    found, taken, known = findings(path, Told())
    if not found.missing:
        found.architecture("any")  # or it says why there can be none
    options = ["--heads N"] * ("heads" in found.missing) + ["--patch-size N"] * ("patch" in found.missing)
    options += ["--grid HxW"] * ("grid" in found.missing) + ["--vae FILE"] * ("decoder" in found.missing)
    following = " ".join(["gtr-export build --checkpoint", shlex.quote(str(path)), *options])
    if known:
        following = f"gtr-export build --model {known} --checkpoint {shlex.quote(str(path))}"
    if as_json:
        print_json(
            {
                "checkpoint": str(path),
                "weights": taken,
                "sizes": found.values,
                "from": found.origins,
                "missing": found.missing,
                "notes": found.notes,
                "known": known,
                "next": following,
            }
        )
        return
    rows = [[name.replace("_", " "), shown(value), found.origins[name]] for name, value in found.values.items()]
    rows += [[name, "?", question] for name, question in found.missing.items()]
    print_table(["what", "size", "from"], rows, title=f"{path.name}: {taken}")
    for note in found.notes:
        click.echo(note)
    if known:
        echo(f"these are the sizes of {known}")
    echo(f"next: {following}")
