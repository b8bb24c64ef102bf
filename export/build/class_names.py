"""--class-names: what people call the classes of a model of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...runtime.errors import BundleError, UsageError, printable
from ...runtime.files import read_json
from ...runtime.models.class_conditioner import imagenet

IMAGENET = "imagenet"
"""In place of a file: the standard names of ImageNet's 1,000 classes."""

_LARGEST = 16 * 2**20
_LONGEST = 400


def read_class_names(path: Path, classes: int) -> tuple[str, ...]:
    """One line per class, in index order; ", " separates several names of one class.

    Args:
        path: UTF-8 text with one class a line, or JSON: a list of texts, or an object from index to text. The word
            ``imagenet`` stands for ImageNet's.
        classes: how many there must be.

    Raises:
        UsageError: no such file, another number of names, or one that is empty, too long, twice there or has control
            characters.
    """
    names = list(imagenet()) if str(path) == IMAGENET else _read(path)
    shown = printable(str(path), 100)
    if len(names) != classes:
        raise UsageError(f"--class-names {shown} has {len(names)} names, the model has {classes} classes")
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        fault = ""
        if not isinstance(name, str):
            fault = f"is a {type(name).__name__}, not a text"
        elif not name.strip():
            fault = "is empty"
        elif not name.isprintable():
            fault = f"has control characters: {printable(name, 60)}"
        elif len(name) > _LONGEST:
            fault = f"has {len(name)} characters, a name has at most {_LONGEST}"
        elif (twice := first.setdefault(name.strip().casefold(), index)) != index:
            fault = f"is {printable(name.strip(), 60)}, and so is that of class {twice}"
        if fault:
            raise UsageError(f"--class-names {shown}: the name of class {index} {fault}")
    return tuple(name.strip() for name in names)


def _read(path: Path) -> list[Any]:
    shown = printable(str(path), 100)
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"--class-names {shown} has {path.stat().st_size} bytes; that is no list of names")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise UsageError(f"--class-names {shown} cannot be read ({reason})") from None
    if not text.lstrip().startswith(("[", "{")):
        return text.removesuffix("\n").split("\n") if text else []
    try:
        value = read_json(path)
    except BundleError as error:
        raise UsageError(f"--class-names {printable(str(error), 200)}") from None
    if isinstance(value, dict):
        wanted = [str(index) for index in range(len(value))]
        if odd := sorted(set(value) - set(wanted)):
            raise UsageError(f"--class-names {shown}: key {printable(odd[0], 40)} is no index in 0..{len(value) - 1}")
        value = [value[index] for index in wanted]
    return value
