"""Class names: what people call the labels of a model, and the other way round.

Knows the two sets of names that models of this project go by (ImageNet-1k in its standard order, and the ten digits).
Does not know models: how many classes there are comes with the call, the label of the null embedding has no name.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from pathlib import Path

from ..errors import UsageError

LABEL_NAMES = ("imagenet", "digits")

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SEPARATORS = re.compile(r"[,;]")
_INDEX = re.compile(r"[+-]?[0-9]+")
_RANGE = re.compile(r"([0-9]+) ?- ?([0-9]+)")
#: No class name is longer than this; what is longer is cut before it is compared or printed.
_LONGEST_NAME = 80
_SUGGESTIONS = 3
#: The two classes whose names are the same word and nothing else.
_MEANINGS = {("imagenet", 134): "crane, the bird", ("imagenet", 517): "crane, the machine"}


def class_names(label_names: str) -> list[str]:
    """All names of every class, in index order; the names of one class are separated by ", ".

    Args:
        label_names: ``imagenet`` (1000 classes, "tench, Tinca tinca" first) or ``digits`` (ten, "0, zero" first).

    Raises:
        UsageError: there is no such set of names.
    """
    return list(_lines(label_names))


def class_name(label: int, label_names: str) -> str:
    """The first name of a class, short enough for a caption.

    Raises:
        UsageError: there is no such set of names, or no class ``label`` in it.
    """
    lines = _lines(label_names)
    if not 0 <= label < len(lines):
        raise UsageError(_out_of_range(str(label), len(lines)))
    return lines[label].split(", ")[0]


def parse_classes(text: str, label_names: str, classes: int) -> list[int]:
    """Class indices from what a person typed: ``"207, goldfish; 0-9"``.

    Items are separated by commas or semicolons. An item is an index, a range with both ends included, or any one name
    of a class, in any case. Order and repeats stay as they are.

    Args:
        text: the items.
        label_names: see :func:`class_names`.
        classes: number of classes of the model; indices are in 0..classes-1.

    Returns:
        At least one index.

    Raises:
        UsageError: an item is empty, out of range, unknown, or the name of several classes.
    """
    if not text.strip():
        raise UsageError('no class given; give indices, ranges or names, for example "207, 0-9"')
    labels: list[int] = []
    for number, raw in enumerate(_SEPARATORS.split(text), start=1):
        item = " ".join(raw.split())
        if not item:
            raise UsageError(f"item {number} of the classes is empty; remove the extra separator")
        labels.extend(_labels_of(item, label_names, classes))
    return labels


def _labels_of(item: str, label_names: str, classes: int) -> list[int]:
    if _INDEX.fullmatch(item):
        return [_index(item, classes)]
    if ends := _RANGE.fullmatch(item):
        first, last = _index(ends[1], classes), _index(ends[2], classes)
        if last < first:
            raise UsageError(f"class range {first}-{last} runs backwards; write {last}-{first}")
        return list(range(first, last + 1))
    found = _index_of_names(label_names).get(item.casefold())
    if found is None:
        raise UsageError(_unknown(item, label_names, classes))
    first, *others = found
    if others:
        meanings = _either([f"{label} ({_meaning(label, label_names)})" for label in found])
        raise UsageError(f'"{item}" is the name of several classes: {meanings}; give the index')
    if first >= classes:
        raise UsageError(_out_of_range(f'{first} ("{item}")', classes))
    return [first]


def _index(digits: str, classes: int) -> int:
    # Thousands of digits are refused by int() itself, so the length is looked at first.
    if len(digits) > 18 or not 0 <= int(digits) < classes:
        raise UsageError(_out_of_range(_shown(digits), classes))
    return int(digits)


def _out_of_range(label: str, classes: int) -> str:
    return f"class {label} is not in 0..{classes - 1}"


def _unknown(item: str, label_names: str, classes: int) -> str:
    index = {name: found for name, found in _index_of_names(label_names).items() if found[0] < classes}
    wanted = item.casefold()[:_LONGEST_NAME]
    # "shark" is fewer edits from "shako" than from any shark, so names that have the words in them come first.
    nearest = [name for name in index if f" {wanted} " in f" {name} "]
    nearest += difflib.get_close_matches(wanted, index, n=_SUGGESTIONS)
    suggestions: dict[tuple[int, ...], str] = {}
    for name in nearest:
        suggestions.setdefault(index[name], f'"{name}" ({", ".join(map(str, index[name]))})')
    if suggestions:
        hint = f"did you mean {_either(list(suggestions.values())[:_SUGGESTIONS])}?"
    else:
        hint = f'give an index in 0..{classes - 1} or a name such as "{class_name(0, label_names)}"'
    return f'no class is called "{_shown(item)}"; {hint}'


def _meaning(label: int, label_names: str) -> str:
    """Enough names to tell a class from another of the same first name."""
    return _MEANINGS.get((label_names, label)) or ", ".join(_lines(label_names)[label].split(", ")[:2])


def _either(choices: list[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def _shown(text: str) -> str:
    """One printable line, whatever was typed."""
    printable = "".join(character if character.isprintable() else "?" for character in text[:_LONGEST_NAME])
    return printable + "…" * (len(text) > _LONGEST_NAME)


@cache
def _lines(label_names: str) -> tuple[str, ...]:
    if label_names == "digits":
        return tuple(f"{digit}, {name}" for digit, name in enumerate(_DIGITS))
    if label_names == "imagenet":
        path = Path(__file__).parent / "data" / "imagenet_classes.txt"
        return tuple(path.read_text(encoding="utf-8").splitlines())
    raise UsageError(f"label names {label_names!r} are not one of {', '.join(LABEL_NAMES)}")


@cache
def _index_of_names(label_names: str) -> dict[str, tuple[int, ...]]:
    """Every single name in lower case, and the classes that it stands for, ascending."""
    index: dict[str, tuple[int, ...]] = {}
    for label, line in enumerate(_lines(label_names)):
        for name in dict.fromkeys(line.casefold().split(", ")):
            index[name] = (*index.get(name, ()), label)
    return index
