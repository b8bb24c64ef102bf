"""The errors that a user can cause. Each carries one line: the thing, both values, and what to do next."""

from __future__ import annotations


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


def printable(text: str, longest: int = 100) -> str:
    """Text from somebody else's file, fit for one line of a terminal: control characters, line ends and lone
    surrogates are escaped, and of what is longer than ``longest`` the middle goes."""

    def cut(text: str) -> str:
        kept = longest - 1
        return text if len(text) <= longest else f"{text[: kept - kept // 2]}…{text[-(kept // 2) :]}"

    # Cut before and after: the text may have megabytes, and an escape is longer than what it stands for.
    return cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut(text)))
