"""Class names: the standard ImageNet order, and what people may type for a list of classes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_deploy.runtime.errors import UsageError
from gtr_deploy.runtime.models.class_conditioner import class_name, class_names, parse_classes

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
#: First names that stand for one class only, by index.
UNIQUE = {
    label: line.split(", ")[0]
    for label, line in enumerate(class_names("imagenet"))
    if sum(line.split(", ")[0].lower() in other.lower().split(", ") for other in class_names("imagenet")) == 1
}


@pytest.mark.parametrize(
    ("label", "name"),
    [
        (0, "tench"),
        (1, "goldfish"),
        (134, "crane"),
        (207, "golden retriever"),
        (281, "tabby"),
        (388, "giant panda"),
        (517, "crane"),
        (963, "pizza"),
        (999, "toilet tissue"),
    ],
)
def test_the_standard_order(label: int, name: str) -> None:
    assert class_name(label, "imagenet") == name


def test_every_class_has_clean_names() -> None:
    names = class_names("imagenet")
    assert len(names) == 1000
    assert names[0] == "tench, Tinca tinca"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"
    assert all(part and part == part.strip() and part.isascii() for line in names for part in line.split(", "))
    assert class_names("digits") == [f"{digit}, {name}" for digit, name in enumerate(DIGITS)]


def test_the_list_is_the_callers_own() -> None:
    class_names("imagenet").clear()
    assert len(class_names("imagenet")) == 1000


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("207", [207]),
        (" 207 ,\n\t1 ", [207, 1]),
        ("3,1,3", [3, 1, 3]),
        ("0-9", list(range(10))),
        ("5 - 5", [5]),
        ("007", [7]),
        ("999", [999]),
        ("Golden  RETRIEVER; goldfish", [207, 1]),
        ("tench, Tinca tinca", [0, 0]),
        ("black-and-tan coonhound", [165]),
        ("toilet paper;2-3,bath towel", [999, 2, 3, 434]),
    ],
)
def test_classes(text: str, labels: list[int]) -> None:
    assert parse_classes(text, "imagenet", 1000) == labels


@pytest.mark.parametrize("digit", range(10))
def test_digits_go_by_figure_and_word(digit: int) -> None:
    assert parse_classes(f"{digit}, {DIGITS[digit]}, {DIGITS[digit].upper()}", "digits", 10) == [digit] * 3
    assert class_name(digit, "digits") == str(digit)


ITEMS = st.one_of(
    st.integers(0, 999).map(lambda label: (str(label), [label])),
    st.tuples(st.integers(0, 999), st.integers(0, 20)).map(
        lambda ends: (f"{ends[0]}-{min(999, ends[0] + ends[1])}", list(range(ends[0], min(999, ends[0] + ends[1]) + 1)))
    ),
    st.sampled_from(sorted(UNIQUE)).map(lambda label: (UNIQUE[label], [label])),
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(ITEMS, st.sampled_from([str.lower, str.upper, str])), min_size=1, max_size=8),
    st.sampled_from([",", ";", " , ", ";  ", ",\n"]),
)
def test_whatever_is_written_out_is_read_back(items: list[Any], separator: str) -> None:
    text = separator.join(spell(written) for (written, _), spell in items)
    expected = [label for (_, labels), _ in items for label in labels]
    assert parse_classes(text, "imagenet", 1000) == expected


def test_nearly_all_first_names_work() -> None:
    assert len(UNIQUE) > 980
    for label, name in UNIQUE.items():
        assert parse_classes(name, "imagenet", 1000) == [label]


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=60), st.sampled_from([("imagenet", 1000), ("digits", 10), ("imagenet", 3)]))
def test_any_text_gives_labels_or_one_line(text: str, model: tuple[str, int]) -> None:
    label_names, classes = model
    labels: list[int] = []
    message = ""
    try:
        labels = parse_classes(text, label_names, classes)
    except UsageError as error:
        message = str(error)
    assert all(0 <= label < classes for label in labels)
    assert bool(labels) != bool(message)
    assert len(message) < 400
    assert message == "" or message.isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1000", "class 1000 is not in 0..999"),
        ("-1", "class -1 is not in 0..999"),
        ("990-1000", "class 1000 is not in 0..999"),
        ("0-99999999999999999999999999", "class 99999999999999999999999999 is not in 0..999"),
        ("9-0", "class range 9-0 runs backwards; write 0-9"),
        ("1,,2", "item 2 of the classes is empty; remove the extra separator"),
        ("1,", "item 2 of the classes is empty; remove the extra separator"),
        (" ;", "item 1 of the classes is empty; remove the extra separator"),
        ("", 'no class given; give indices, ranges or names, for example "207, 0-9"'),
        (" \n", 'no class given; give indices, ranges or names, for example "207, 0-9"'),
        ("zzzqq", 'no class is called "zzzqq"; give an index in 0..999 or a name such as "tench"'),
        ("crane", '"crane" is the name of several classes: 134 (crane, the bird) or 517 (crane, the machine); '
         "give the index"),
        ("MAILLOT", '"MAILLOT" is the name of several classes: 638 (maillot) or 639 (maillot, tank suit); '
         "give the index"),
        ("cardigan", '"cardigan" is the name of several classes: 264 (Cardigan, Cardigan Welsh corgi) or '
         "474 (cardigan); give the index"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_classes(text, "imagenet", 1000)
    assert str(error.value) == message


def test_thousands_of_digits_are_cut() -> None:
    with pytest.raises(UsageError, match=r"^class 9{80}… is not in 0\.\.9$"):
        parse_classes("9" * 5000, "digits", 10)


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("golden retreiver", '"golden retriever" (207)'),
        ("shark", '"great white shark" (2)'),
        ("gold fish", '"goldfish" (1)'),
        ("pandas", '"panda" (387, 388)'),
    ],
)
def test_unknown_names_get_suggestions(text: str, suggestion: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_classes(text, "imagenet", 1000)
    assert str(error.value).startswith(f'no class is called "{text}"; did you mean ')
    assert suggestion in str(error.value)
    assert str(error.value).count("(") <= 3


def test_a_single_suggestion() -> None:
    with pytest.raises(UsageError, match=r'^no class is called "sevenn"; did you mean "seven" \(7\)\?$'):
        parse_classes("sevenn", "digits", 10)


def test_models_with_fewer_classes_than_names() -> None:
    with pytest.raises(UsageError, match=r'^class 207 \("golden retriever"\) is not in 0\.\.9$'):
        parse_classes("golden retriever", "imagenet", 10)
    with pytest.raises(UsageError) as error:
        parse_classes("golden retreiver", "imagenet", 10)
    assert "207" not in str(error.value)


@pytest.mark.parametrize("label", [-1, 10, 10**9])
def test_a_label_without_name(label: int) -> None:
    with pytest.raises(UsageError, match=rf"^class {label} is not in 0\.\.9$"):
        class_name(label, "digits")


@pytest.mark.parametrize(
    "call", [class_names, lambda kind: class_name(0, kind), lambda kind: parse_classes("a", kind, 9)]
)
def test_unknown_label_names(call) -> None:
    with pytest.raises(UsageError, match="label names 'letters' are not one of imagenet, digits"):
        call("letters")
