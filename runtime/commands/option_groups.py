"""Groups of command-line options that several commands share, handed over as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def with_options(
    command: Callable[..., Any],
    options: Mapping[str, Callable[..., Any]],
    gather: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[..., Any]:
    """Adds options to a command that has not become a click command yet.

    Args:
        command: gets what ``gather`` makes of the options' values, in place of them.
        options: parameter name to a ``click.option(...)`` that stores under this name, in the order of ``--help``.
        gather: parameter names and values to keyword arguments of ``command``.
    """

    def collected(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in options}
        return command(*args, **gather(values), **kwargs)

    collected.__name__, collected.__doc__ = command.__name__, command.__doc__
    wrapped: Callable[..., Any] = collected
    if hasattr(command, "__click_params__"):  # where click keeps the options of decorators further in
        wrapped.__click_params__ = command.__click_params__  # type: ignore[attr-defined]
    for option in reversed(list(options.values())):
        wrapped = option(wrapped)
    return wrapped


def given(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values that are not None, by name without ``prefix``."""
    return {name.removeprefix(prefix): value for name, value in values.items() if value is not None}
