"""Class labels: the requests of class-conditional models, and what people call the classes.

Names are lines in index order, the names of one class separated by ", "; they are part of the bundle. Does not know
models: the label of the null embedding is the one after the last class, and has no name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from ..errors import UsageError, printable
from .conditioning import Arrays, Conditioner, RequestOption
from .graphs import TensorSpec

_NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = tuple(f"{digit}, {name}" for digit, name in enumerate(_NUMERALS))
"""The classes of mar-digits."""

_SEPARATORS = re.compile(r"[,;]")
_INDEX = re.compile(r"[+-]?[0-9]+")
_RANGE = re.compile(r"([0-9]+) ?- ?([0-9]+)")
_BLANKS = re.compile(r"[0-9]+(-[0-9]+)?( [0-9]+(-[0-9]+)?)+")
_WNID = re.compile(r"n[0-9]{8}")
_ALL = "all"
#: No class name is longer than this; what is longer is cut before it is compared or printed.
_LONGEST_NAME = 80
_SUGGESTIONS = 3


@cache
def imagenet() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet-1k in their standard order, "tench, Tinca tinca" first."""
    return _lines("imagenet_classes.txt")


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """Their WordNet ids, which folders of ImageNet are called by: "n01440764" first; ascending."""
    return _lines("imagenet_wnids.txt")


def _lines(name: str) -> tuple[str, ...]:
    return tuple((Path(__file__).parent / "data" / name).read_text(encoding="utf-8").splitlines())


class ClassConditioner(Conditioner, frozen=True, forbid_unknown_fields=True):
    """Requests are class labels 0..classes-1; ``class_names`` has one line per class."""

    class_names: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=400)], ...], Meta(min_length=1, max_length=1 << 16)
    ]

    inputs: ClassVar = (TensorSpec("labels", "int64", ("G", "B")),)
    option: ClassVar = RequestOption(
        "--classes", 'Class indices, ranges, names, or all: "3,7", "0-9", "golden retriever".'
    )

    @property
    def classes(self) -> int:
        """Number of classes; also the label of the unconditional branch."""
        return len(self.class_names)

    def __post_init__(self) -> None:
        for index, name in enumerate(self.class_names):
            if not name.isprintable():
                raise ValueError(f"the name of class {index} has characters that cannot be printed: {printable(name)}")

    def check_architecture(self, architecture: Any) -> None:
        if architecture.classes != self.classes:
            raise ValueError(f"{self.classes} class names for a model of {architecture.classes} classes")

    def parse(self, text: str) -> list[int]:
        return parse_classes(text, self.class_names)

    def checked(self, request: Any) -> int:
        if isinstance(request, bool) or not isinstance(request, int | np.integer):
            raise UsageError(f"class {request!r} is not a whole number")
        class_name(int(request), self.class_names)  # or there is none
        return int(request)

    def caption(self, request: int) -> str:
        return class_name(request, self.class_names)

    def stem(self, request: int) -> str:
        # The number first and as wide as the last one: what reads a folder per class numbers them as they sort.
        number = f"class{request:0{len(str(self.classes - 1))}d}"
        slug = "".join(c if c.isalnum() else "_" for c in self.caption(request))[:40]
        return number if slug == str(request) else f"{number}-{slug}"

    def record(self, request: int) -> dict[str, Any]:
        return {"class": request, "class_name": self.caption(request)}

    def recalled(self, record: Mapping[str, Any]) -> int:
        return self.checked(record.get("class"))

    def samples(self, count: int, spread: bool = False) -> list[int]:
        classes = self.classes
        return [i * classes // count if spread and count < classes else i % classes for i in range(count)]

    def arrays(self, requests: Sequence[int]) -> Arrays:
        return {"labels": np.array([requests, [self.classes] * len(requests)], dtype=np.int64)}

    def example(self, rng: np.random.Generator, sizes: Mapping[str, int]) -> Arrays:
        return {"labels": rng.integers(0, self.classes + 1, (sizes.get("G", 1), sizes.get("B", 1)))}

    def stored(self, requests: Sequence[int]) -> Arrays:
        return {"labels": np.array(requests)}

    def restored(self, arrays: Mapping[str, NDArray[Any]], count: int) -> list[int]:
        labels = arrays.get("labels")
        if labels is None:
            raise UsageError("has no labels; gtr-run generate --save-latents writes them")
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise UsageError(f"labels are {labels.dtype} {list(labels.shape)}, not {count} integers")
        return [self.checked(label) for label in labels.tolist()]

    @property
    def summary(self) -> str:
        first, last = self.caption(0), self.caption(self.classes - 1)
        return f"{self.classes} classes, {first} to {last}" if self.classes > 1 else f"1 class, {first}"


def class_name(label: int, names: tuple[str, ...]) -> str:
    """The first name of a class, short enough for a caption.

    Raises:
        UsageError: there is no class ``label``.
    """
    if not 0 <= label < len(names):
        raise UsageError(_out_of_range(str(label), len(names)))
    return names[label].split(", ")[0]


def parse_classes(text: str, names: tuple[str, ...]) -> list[int]:
    """Class indices, at least one, from what a person typed: ``"207, goldfish; 0-9"``.

    Items are separated by commas or semicolons. An item is an index, a range with both ends included, several of these
    with blanks between them, ``all``, or any one name of a class, in any case and with blanks or underscores; with
    ImageNet's names also a WordNet id (``n02099601``). Order and repeats stay as they are.

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
        labels.extend(_labels_of(item, names))
    return labels


def _labels_of(item: str, names: tuple[str, ...]) -> list[int]:
    classes = len(names)
    if _INDEX.fullmatch(item):
        return [_index(item, classes)]
    if ends := _RANGE.fullmatch(item):
        first, last = _index(ends[1], classes), _index(ends[2], classes)
        if last < first:
            raise UsageError(f"class range {first}-{last} runs backwards; write {last}-{first}")
        return list(range(first, last + 1))
    known, wanted = _index_of_names(names), item.casefold()
    found = known.get(wanted) or known.get(" ".join(wanted.replace("_", " ").split()))
    if found is None:
        if _BLANKS.fullmatch(item):
            return [label for part in item.split() for label in _labels_of(part, names)]
        if wanted == _ALL:
            return list(range(classes))
        if _WNID.fullmatch(wanted) and names == imagenet() and wanted in imagenet_wnids():
            return [imagenet_wnids().index(wanted)]
        raise UsageError(_unknown(item, names))
    first, *others = found
    if others:
        # Two names tell a class from another of the same first name.
        meanings = _either([f"{label} ({', '.join(names[label].split(', ')[:2])})" for label in found])
        raise UsageError(f'"{item}" is the name of several classes: {meanings}; give the index')
    return [first]


def _index(digits: str, classes: int) -> int:
    # Thousands of digits are refused by int() itself, so the length is looked at first.
    if len(digits) > 18 or not 0 <= int(digits) < classes:
        raise UsageError(_out_of_range(_shown(digits), classes))
    return int(digits)


def _out_of_range(label: str, classes: int) -> str:
    return f"class {label} is not in 0..{classes - 1}"


def _unknown(item: str, names: tuple[str, ...]) -> str:
    index = _index_of_names(names)
    wanted = item.casefold()[:_LONGEST_NAME]
    # "shark" is fewer edits from "shako" than from any shark, so names that have the words in them come first.
    nearest = [name for name in index if f" {wanted} " in f" {name} "]
    nearest += difflib.get_close_matches(wanted, index, n=_SUGGESTIONS)
    suggestions: dict[tuple[int, ...], str] = {}
    for name in nearest:
        suggestions.setdefault(index[name], f'"{name}" ({", ".join(map(str, index[name]))})')
    hint = f'give an index in 0..{len(names) - 1} or a name such as "{class_name(0, names)}"'
    if suggestions:
        hint = f"did you mean {_either(list(suggestions.values())[:_SUGGESTIONS])}?"
    return f'no class is called "{_shown(item)}"; {hint}'


def _either(choices: list[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def _shown(text: str) -> str:
    """One printable line, whatever was typed."""
    printable = "".join(character if character.isprintable() else "?" for character in text[:_LONGEST_NAME])
    return printable + "…" * (len(text) > _LONGEST_NAME)


@cache
def _index_of_names(names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Every single name in lower case, and the classes that it stands for, ascending."""
    index: dict[str, tuple[int, ...]] = {}
    for label, line in enumerate(names):
        for name in dict.fromkeys(line.casefold().split(", ")):
            index[name] = (*index.get(name, ()), label)
    return index
