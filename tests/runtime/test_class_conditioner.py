"""Class names: the standard ImageNet order, and what people may type for a list of classes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_deploy.runtime.errors import UsageError
from gtr_deploy.runtime.models.class_conditioner import DIGITS as DIGIT_LINES
from gtr_deploy.runtime.models.class_conditioner import (
    ClassConditioner,
    class_name,
    imagenet,
    imagenet_wnids,
    parse_classes,
)

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
#: First names that stand for one class only, by index.
UNIQUE = {
    label: line.split(", ")[0]
    for label, line in enumerate(imagenet())
    if sum(line.split(", ")[0].lower() in other.lower().split(", ") for other in imagenet()) == 1
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
    assert class_name(label, imagenet()) == name


def test_every_class_has_clean_names() -> None:
    names = imagenet()
    assert len(names) == 1000
    assert names[0] == "tench, Tinca tinca"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"
    assert all(part and part == part.strip() and part.isascii() for line in names for part in line.split(", "))
    assert tuple(f"{digit}, {name}" for digit, name in enumerate(DIGITS)) == DIGIT_LINES


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
        ("golden_retriever, Golden_Retriever,black-and-tan_coonhound", [207, 207, 165]),
        ("207 360", [207, 360]),
        ("1 2-3  999,0", [1, 2, 3, 999, 0]),
        ("n02099601, N01440764;n15075141", [207, 0, 999]),
        ("all", list(range(1000))),
        ("5, ALL", [5, *range(1000)]),
    ],
)
def test_classes(text: str, labels: list[int]) -> None:
    assert parse_classes(text, imagenet()) == labels


def test_wordnet_ids_are_those_of_the_names() -> None:
    ids = imagenet_wnids()
    assert len(set(ids)) == len(imagenet())
    assert list(ids) == sorted(ids)  # the standard order is theirs
    assert all(re.fullmatch("n[0-9]{8}", wnid) for wnid in ids)
    known = {"n02123045": "tabby", "n02510455": "giant panda", "n03126707": "crane", "n07873807": "pizza"}
    assert {wnid: class_name(ids.index(wnid), imagenet()) for wnid in known} == known


def test_a_class_s_own_name_comes_first() -> None:
    names = ("all", "3 4", "n02099601", "5_6", "b_c", "b c")
    assert [parse_classes(name, names) for name in names] == [[0], [1], [2], [3], [4], [5]]
    assert parse_classes("ALL,0 1", names) == [0, 0, 1]


@pytest.mark.parametrize("digit", range(10))
def test_digits_go_by_figure_and_word(digit: int) -> None:
    assert parse_classes(f"{digit}, {DIGITS[digit]}, {DIGITS[digit].upper()}", DIGIT_LINES) == [digit] * 3
    assert class_name(digit, DIGIT_LINES) == str(digit)


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
    assert parse_classes(text, imagenet()) == expected


def test_nearly_all_first_names_work() -> None:
    assert len(UNIQUE) > 980
    for label, name in UNIQUE.items():
        assert parse_classes(name, imagenet()) == [label]


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=60), st.sampled_from([imagenet(), DIGIT_LINES, imagenet()[:3]]))
def test_any_text_gives_labels_or_one_line(text: str, names: tuple[str, ...]) -> None:
    labels: list[int] = []
    message = ""
    try:
        labels = parse_classes(text, names)
    except UsageError as error:
        message = str(error)
    assert all(0 <= label < len(names) for label in labels)
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
        ("1 1000", "class 1000 is not in 0..999"),
        ("n00000000", 'no class is called "n00000000"; give an index in 0..999 or a name such as "tench"'),
        ("zzzqq", 'no class is called "zzzqq"; give an index in 0..999 or a name such as "tench"'),
        ("crane", '"crane" is the name of several classes: 134 (crane, crane bird) or 517 (crane, crane machine); '
         "give the index"),
        ("MAILLOT", '"MAILLOT" is the name of several classes: 638 (maillot) or 639 (maillot, tank suit); '
         "give the index"),
        ("cardigan", '"cardigan" is the name of several classes: 264 (Cardigan, Cardigan Welsh corgi) or '
         "474 (cardigan); give the index"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_classes(text, imagenet())
    assert str(error.value) == message


def test_thousands_of_digits_are_cut() -> None:
    with pytest.raises(UsageError, match=r"^class 9{80}… is not in 0\.\.9$"):
        parse_classes("9" * 5000, DIGIT_LINES)


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
        parse_classes(text, imagenet())
    assert str(error.value).startswith(f'no class is called "{text}"; did you mean ')
    assert suggestion in str(error.value)
    assert str(error.value).count("(") <= 3


def test_wordnet_ids_are_for_imagenet_s_names_only() -> None:
    with pytest.raises(UsageError, match='no class is called "n02099601"'):
        parse_classes("n02099601", DIGIT_LINES)
    assert parse_classes("all", DIGIT_LINES) == list(range(10))


def test_a_single_suggestion() -> None:
    with pytest.raises(UsageError, match=r'^no class is called "sevenn"; did you mean "seven" \(7\)\?$'):
        parse_classes("sevenn", DIGIT_LINES)


@pytest.mark.parametrize("label", [-1, 10, 10**9])
def test_a_label_without_name(label: int) -> None:
    with pytest.raises(UsageError, match=rf"^class {label} is not in 0\.\.9$"):
        class_name(label, DIGIT_LINES)


# The conditioner.

DIGITS_ASKED = ClassConditioner(DIGIT_LINES)


def test_arrays_lead_with_the_branches() -> None:
    (labels,) = DIGITS_ASKED.arrays([3, 7]).values()
    assert labels.dtype == np.int64
    assert labels.tolist() == [[3, 7], [10, 10]]
    assert [tensor.name for tensor in ClassConditioner.inputs] == list(DIGITS_ASKED.arrays([0]))


def test_samples_go_round_or_over_the_whole_range() -> None:
    assert DIGITS_ASKED.samples(12) == [*range(10), 0, 1]
    assert DIGITS_ASKED.samples(5, spread=True) == [0, 2, 4, 6, 8]
    assert ClassConditioner(("only",)).samples(3, spread=True) == [0, 0, 0]


def test_examples_have_the_sizes_that_were_asked_for() -> None:
    (labels,) = DIGITS_ASKED.example(np.random.default_rng(0), {"G": 2, "B": 50}).values()
    assert labels.shape == (2, 50)
    assert set(labels.ravel().tolist()) == set(range(11))


def test_what_is_stored_comes_back() -> None:
    assert DIGITS_ASKED.restored(DIGITS_ASKED.stored([3, 3, 9]), 3) == [3, 3, 9]
    for arrays, reason in (
        ({}, "no labels"),
        ({"labels": np.array([1.0, 2.0])}, "float64"),
        ({"labels": np.array([1, 2, 3])}, r"\[3\]"),
        ({"labels": np.array([1, 10])}, "class 10 is not in"),
    ):
        with pytest.raises(UsageError, match=reason):
            DIGITS_ASKED.restored(arrays, 2)


@pytest.mark.parametrize("request_", [-1, 10, 3.0, True, "3", None])
def test_what_is_no_class_is_refused(request_: object) -> None:
    with pytest.raises(UsageError, match="class "):
        DIGITS_ASKED.checked(request_)


def test_a_file_name_has_nothing_that_a_path_could_be() -> None:
    hostile = ClassConditioner(("../../etc/passwd, x", "a:red*"))
    assert hostile.stem(0) == "class0-______etc_passwd"
    assert hostile.stem(1) == "class1-a_red_"
    assert hostile.record(0) == {"class": 0, "class_name": "../../etc/passwd"}
    assert hostile.recalled(hostile.record(1)) == 1
    with pytest.raises(ValueError, match="cannot be printed"):
        ClassConditioner(("a\x1b[31mred",))


def test_file_names_sort_as_the_classes_do() -> None:
    stems = [ClassConditioner(imagenet()).stem(label) for label in range(1000)]
    assert [stem.split("-")[0] for stem in sorted(stems)] == [f"class{label:03d}" for label in range(1000)]
    assert stems[1] == "class001-goldfish"
