"""Writes docs/api.md: signatures and docstrings of every public name. `make api` runs it; a test compares the page.

Knows nothing of what the names are: it prints what gtr_deploy and gtr_deploy.runtime list in __all__.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import gtr_deploy
import gtr_deploy.runtime

PAGE = Path(__file__).with_name("api.md")
HEAD = """# Python API

Made by `make api` from the docstrings; do not edit. `from gtr_deploy import Pipeline`; everything else from
`gtr_deploy.runtime`. Arrays are NumPy's. Every error raised on purpose is a `GtrError` with one line of message.
"""


def public_names() -> dict[str, Any]:
    """Every public name, the front door first, then by the alphabet."""
    modules = (gtr_deploy, gtr_deploy.runtime)
    found = {name: getattr(module, name) for module in modules for name in module.__all__ if not name.startswith("_")}
    return {name: found[name] for name in sorted(found, key=lambda name: (name not in gtr_deploy.__all__, name))}


def members(cls: type) -> Iterator[tuple[str, str]]:
    """The public members that a class defines itself, in the order of its source: their names and blocks."""
    for name, member in vars(cls).items():
        value = isinstance(member, property | cached_property)
        if not name.startswith("_") and (value or inspect.isroutine(getattr(cls, name))):
            yield name, block(name if value else called(name, getattr(cls, name)), member)


def section(name: str, thing: Any) -> str:
    """The text of one name: a class with its members, a function, or a table with its keys."""
    if isinstance(thing, dict):
        return f"## {name}\n\nA table with these keys: " + ", ".join(f"`{key}`" for key in thing) + ".\n"
    if isinstance(thing, type) and issubclass(thing, Exception):
        return f"## {name}\n\n" + block(f"{name}({thing.__bases__[0].__name__})", thing)
    parts = [f"## {name}\n\n" + block(called(name, thing), thing)]
    if isinstance(thing, type):
        parts += [f"### {name}.{member}\n\n{text}" for member, text in members(thing)]
    return "\n".join(parts)


def called(name: str, thing: Any) -> str:
    """A call's signature as it is written, one parameter a line where it is long."""
    signature = inspect.signature(thing)
    words = [str(parameter) for parameter in signature.parameters.values() if parameter.name != "self"]
    words = [re.sub(r"(: )'([^']*)'", r"\1\2", word) for word in words]  # annotations are texts here
    back = signature.return_annotation
    back = back if isinstance(back, str) else inspect.formatannotation(back)
    result = "" if isinstance(thing, type) or signature.return_annotation is signature.empty else f" -> {back}"
    line = f"{name}({', '.join(words)}){result}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){result}"


def block(head: str, thing: Any) -> str:
    """A signature and its docstring; links for documentation tools become plain code."""
    text = re.sub(r":\w+:`~?\.*([^`]+)`", r"`\1`", inspect.getdoc(thing) or "")
    return f"```text\n{head}\n\n{text}\n```\n"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section(name, thing) for name, thing in public_names().items())])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
