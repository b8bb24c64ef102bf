"""What a build knows of its model before it starts: an own checkpoint's sizes, and what its classes are called.

Importing this module does not import torch; a checkpoint is looked at where its sizes are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs

from ...runtime.commands.console import Reporter
from ...runtime.errors import GtrError, UsageError, printable
from ...runtime.models.architecture import Architecture
from ...runtime.models.class_conditioner import ClassConditioner
from ...runtime.models.families import known_models
from ...runtime.models.family import KnownModel
from ...runtime.models.mar import MarArchitecture
from ...runtime.models.nothing import NothingAsked
from ...runtime.sampling.plan import PlanSettings, resolve
from ..zoo import KL16, ModelEntry
from .class_names import read_class_names
from .inference import Findings, find
from .request import AUTO, BuildRequest
from .told import Told, VaeFacts

NEUTRAL_PLAN = {"cfg": 1.0, "cfg_schedule": "linear", "max_timestep": 999, "temperature": 1.0}
"""Plans on a model of one's own start from these: the defaults of the original's main_mar.py, which are no guidance."""


_LANDMARKS = ("mask_token", "encoder_pos_embed_learned", "z_proj.weight", "diffloss.net.input_proj.weight")
"""Names that every MAR has."""


def resolved(request: BuildRequest, reporter: Reporter) -> BuildRequest:
    """The request with the model's sizes, class names and defaults found.

    Raises:
        UsageError: see :meth:`BuildRequest.check`; something that only an option can say, or that contradicts one.
        GtrError: the file is no MAR checkpoint in the official layout, or contradicts itself.
    """
    request.check()
    if request.found is not None:
        return request
    if request.model != AUTO:
        entry = request.entry()
        if request.own.decoder == "none":
            entry = without_decoder(entry)
        architecture = entry.architecture
        classes = architecture.classes if isinstance(architecture, MarArchitecture) else 0
    else:
        path = request.checkpoint
        assert path is not None  # checked
        if not path.exists():
            raise UsageError(f"--checkpoint {printable(str(path))} does not exist")
        own, vae = request.own, request.vae and _vae_facts(request.vae)
        told = Told(
            own.heads, own.patch_size, own.grid, vae, own.decoder, own.latent_scale, own.latent_shift, own.unconditional
        )
        found, _, known = findings(path, told, request.weights)
        try:
            architecture = found.architecture(request.name)
        except GtrError as error:
            notes = "".join(f"; {note}" for note in found.notes)
            hint = f", or --model {known} if it is that" if known and found.missing else ""
            raise _named(path, error, hint + notes) from None
        for line in (found.summary, *found.notes):
            reporter.say(f"model: {line}")
        if known:
            reporter.say(f"model: the sizes are those of {known}; --model {known} has its class names and guidance")
        source = KL16 if architecture.decoder.has_weights else None
        classes = found.values["classes"]
        asked = ClassConditioner(tuple(map(str, range(classes)))) if classes else NothingAsked()
        entry = ModelEntry(KnownModel(architecture, asked, NEUTRAL_PLAN | found.plan_defaults), vae=source)
    if request.class_names is not None:
        if not classes:
            raise UsageError(f"--class-names: {request.name} is not asked for by class")
        conditioner = ClassConditioner(read_class_names(request.class_names, classes))
        entry = replace(entry, model=replace(entry.model, conditioner=conditioner))
    if request.plan_defaults:
        defaults = {**entry.plan_defaults, **request.plan_defaults}
        check_defaults(defaults, architecture)
        entry = replace(entry, model=replace(entry.model, plan_defaults=defaults))
    return replace(request, found=entry)


def without_decoder(entry: ModelEntry) -> ModelEntry:
    """The model with its latents as what it gives."""
    architecture = entry.architecture
    decoder = structs.replace(architecture.decoder, kind="none")
    return replace(
        entry, vae=None, model=replace(entry.model, architecture=structs.replace(architecture, decoder=decoder))
    )


def _vae_facts(path: Path) -> VaeFacts:
    from .vae import vae_facts

    if not path.exists():
        raise UsageError(f"--vae {printable(str(path))} does not exist")
    return vae_facts(path)


def check_defaults(defaults: Mapping[str, Any], architecture: Architecture) -> None:
    """Whether plans can start from these.

    Raises:
        PlanError: a value is out of range, or this model cannot be guided.
    """
    # The shortest plan there is: what presets choose themselves has nothing to do with it.
    shortest = PlanSettings("defaults", (1,), generation_diffusion=(1, 1), reconstruction_diffusion=1, fts_diffusion=1)
    resolve(shortest, architecture, defaults)


def findings(path: Path, told: Told, wanted: str = "auto") -> tuple[Findings, str, str | None]:
    """What a checkpoint and a person say of the model, every key and shape compared.

    Args:
        wanted: which weights, of ``state_dicts.CHOICES``.

    Returns:
        The sizes, which weights were looked at (``checkpoints.load_mar``), and the zoo's model of these very sizes.

    Raises:
        UsageError, GtrError: see :func:`~.inference.find`; with the file's name.
    """
    from .checkpoints import compare, expected_mar, looks_like
    from .files import refusal
    from .layouts import CLASSES, is_emigm, official
    from .reading import read_checkpoint
    from .state_dicts import choose, find_state_dicts

    content = read_checkpoint(path)
    chosen = choose(path, find_state_dicts(content, _LANDMARKS), wanted, _LANDMARKS)
    state, taken = chosen.entries, str(chosen)
    try:
        found = find(state, content.get("args"), told)
        shapes = found.shapes()
    except GtrError as error:
        raise _named(path, error) from None
    emigm, state = is_emigm(state), official(state, () if found.values["classes"] else (CLASSES,))
    if problems := compare(state, expected_mar(shapes)):
        raise refusal(path, f"is no MAR checkpoint in the official layout: {problems}")
    known = None if emigm else known_models().get(looks_like(state) or "")
    same = known is not None and not compare(state, expected_mar(known.architecture))
    return found, taken, known.architecture.name if known is not None and same else None


def _named(path: Path, error: GtrError, hint: str = "") -> GtrError:
    from .files import refusal

    return type(error)(str(refusal(path, f"{error}{hint}")))
