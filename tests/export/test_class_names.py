"""--class-names: lists as people have them, and what is wrong with others, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from commands import one_line_error

from gtr_deploy.export.build.class_names import read_class_names
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import UsageError
from gtr_deploy.runtime.models.class_conditioner import imagenet

THREE = ("cat, pussy", "größerer Hund", "7")


@pytest.mark.parametrize(
    "text",
    [
        "cat, pussy\ngrößerer Hund\n7\n",
        "\ufeff cat, pussy\r\ngrößerer Hund \r\n7",
        json.dumps(THREE),
        json.dumps({"2": THREE[2], "0": THREE[0], "1": THREE[1]}, indent=1),
    ],
)
def test_lists(tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_text(text, encoding="utf-8")
    assert read_class_names(tmp_path / "names", 3) == THREE


def test_imagenet_is_a_word() -> None:
    assert read_class_names(Path("imagenet"), 1000) == imagenet()
    with pytest.raises(UsageError, match="imagenet has 1000 names, the model has 10 classes"):
        read_class_names(Path("imagenet"), 10)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has 0 names, the model has 3 classes"),
        ("a\nb\n", "has 2 names, the model has 3 classes"),
        ("a\nb\nc\n\n", "has 4 names"),
        ("a\n\nc\n", "name of class 1 is empty"),
        ("a\n  \nc\n", "name of class 1 is empty"),
        ("a\nb\x1b[31m\nc\n", r"name of class 1 has control characters: b\x1b[31m"),
        ("a\tb\nb\nc\n", r"name of class 0 has control characters: a\tb"),
        ("a\nb\nA\n", "name of class 2 is A, and so is that of class 0"),
        (f"a\nb\n{'c' * 401}\n", "name of class 2 has 401 characters"),
        ('["a", "b", 3]', "name of class 2 is a int, not a text"),
        ('["a", "b\\n", "c"]', "name of class 1 has control characters"),
        ('["a", "b", "c"', "cannot be read"),
        ('{"0": "a", "1": "b", "3": "c"}', "key 3 is no index in 0..2"),
        ('{"0": "a", "0": "b", "1": "c"}', "a key stands twice"),
        ('{"0": "a", "1": "b", "02": "c"}', "key 02 is no index in 0..2"),
    ],
)
def test_faults_are_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_class_names(path, 3)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(f"--class-names {path}")
    assert str(caught.value).isprintable()


def test_what_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00")
    with (tmp_path / "b").open("wb") as file:
        file.truncate(2**40)
    for name, complaint in (("none", "No such file"), (".", "Is a directory"), ("a", "no UTF-8"), ("b", "no list of")):
        with pytest.raises(UsageError, match=complaint):
            read_class_names(tmp_path / name, 3)


def test_they_are_kept_in_the_bundle_and_change_no_graph(
    export_cli: Callable[..., Result], run_cli: Callable[..., Result], own_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps([f"figure {index}" for index in range(10)]))
    options = ["build", "--model", "mar-digits", "--out", own_bundle, "--json"]
    stages = json.loads(export_cli(*options, "--class-names", path).stdout)["stages"]
    assert stages.pop("manifest") == "built"
    assert set(stages.values()) == {"cached"}
    assert "10 classes, figure 0 to figure 9" in export_cli("inspect", own_bundle).stdout
    stages = json.loads(export_cli(*options, "--class-names", path).stdout)["stages"]
    assert set(stages.values()) == {"cached"}
    done = run_cli("generate", own_bundle, "--classes", "figure_7 8", "--out", tmp_path / "out")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    done = run_cli(
        "generate", own_bundle, "--classes", "figure_7, 8 9", "--plan", "gtr-fast", "--out", tmp_path / "out"
    )
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        f"class{label}-figure_{label}-gtr-fast-seed{seed:06d}.png" for seed, label in enumerate((7, 8, 9))
    ]
    path.write_text('["one"]')
    one_line_error(export_cli(*options, "--class-names", path), 2, "has 1 names, the model has 10 classes")
    assert Bundle.load(own_bundle).conditioner.summary == "10 classes, figure 0 to figure 9"
