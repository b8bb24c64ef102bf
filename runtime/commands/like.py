"""gtr-run generate --like: the request, seed and plan of a picture, from its own settings, which anybody may have
written."""

from __future__ import annotations

from pathlib import Path

from ..bundle.reader import Bundle
from ..errors import GtrError, UsageError, printable
from ..models.conditioning import Request
from ..pictures.png import read_settings
from ..sampling.noise import checked_seed
from ..sampling.plan import PlanSettings, SamplingPlan, resolve
from .console import Reporter
from .run_folder import difference


def settings_of(path: Path, bundle: Bundle, backend: str, reporter: Reporter) -> tuple[Request, int, SamplingPlan]:
    """What to ask, the seed and the plan that make the picture again.

    A picture of another model is refused: its class or plan would mean something else here. One of another bundle of
    the same model, precision or backend is made with a line that says so, since to compare these is what it is for.

    Raises:
        GtrError: the file holds no settings, or none that fit the bundle; one line.
    """
    found = read_settings(path)
    here = {"bundle": bundle.digest, "precision": bundle.precision, "backend": backend}
    if differs := difference(found, {"model": bundle.architecture.name}):
        raise GtrError(f"{path} is a picture of another model: {differs}; give its bundle")
    try:
        request = bundle.conditioner.recalled(found)
        if differs := difference(found, bundle.conditioner.record(request)):
            raise UsageError(differs)
        if not isinstance(plan := found.get("plan"), dict):
            raise UsageError("there is no plan")
        if not isinstance(plan.get("name"), str) or len(plan["name"]) > 300:
            raise UsageError("the plan has no name of at most 300 characters")
        seed, resolved = checked_seed(found.get("seed", "")), resolve(PlanSettings.from_json(plan), bundle.architecture)
    except (UsageError, OverflowError) as error:
        reason = "a number is too large" if isinstance(error, OverflowError) else printable(str(error), 200)
        raise GtrError(f"{path}: its settings cannot be used: {reason}") from None
    if differs := [text for key in here if (text := difference(found, here, key))]:
        reporter.say(f"{path}: {', '.join(differs)}; the new picture may differ in its details")
    return request, seed, resolved
