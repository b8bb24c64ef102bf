"""Parts that are found by name, so that the runtime imports nothing of the packages that they need."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from ..errors import GtrError


def load_plugin(group: str, name: str, missing: str) -> Any:
    """What an entry point stands for.

    Args:
        missing: the line for people where it is not installed.
    """
    found = tuple(entry_points(group=group, name=name))
    if not found:
        raise GtrError(missing)
    try:
        return found[0].load()
    except ImportError as cause:
        raise GtrError(f"{missing} ({cause})") from None
