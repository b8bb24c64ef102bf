"""The errors that a user can cause. Each carries one line: the thing, both values, and what to do next."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with a ``?`` for every character that could move a terminal's cursor, or cannot be written."""
    return "".join(character if character.isprintable() else "?" for character in text)


class GtrError(Exception):
    """Something went wrong that the user can act on; the commands print it as one line and exit with 1."""


class UsageError(GtrError):
    """The request itself is wrong (a setting out of range, an unknown class); the commands exit with 2."""


class BundleError(GtrError):
    """A bundle, or a file in it, is not what it says it is."""


class PlanError(UsageError):
    """A sampling plan's settings contradict each other or the model."""


class BackendError(GtrError):
    """An engine library is missing, refuses a graph, or fails while it runs."""
