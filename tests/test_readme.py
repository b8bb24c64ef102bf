"""What the README and the docs tell people to type exists, and the README's Python runs."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from gtr_deploy.export.cli import main as export_main
from gtr_deploy.runtime.cli import main as run_main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GROUPS = {"gtr-run": run_main, "gtr-export": export_main}


def _commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")  # commands that go on in the next line
        lines = re.findall(r"^ {4}(?:\S*/)?(gtr-(?:run|export) .*)$", text, re.MULTILINE)
        found += [(page.name, command) for command in [*lines, *re.findall(r"`(gtr-(?:run|export) [^`]*)`", text)]]
    return found


def test_the_pages_do_name_commands() -> None:
    assert len(_commands()) >= 8


@pytest.mark.parametrize(("page", "command"), _commands())
def test_named_commands_and_options_exist(page: str, command: str) -> None:
    program, name, *words = shlex.split(command, comments=True)
    group = GROUPS[program]
    context = click.Context(group)
    subcommand = group.get_command(context, name)
    assert subcommand is not None, f"{page}: {command}"
    known = {option for parameter in subcommand.params for option in parameter.opts}
    used = {word for word in words if word.startswith("--")}
    assert used <= known, f"{page}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    for target in re.findall(r"\b((?:runtime|calibration|export|tests|benchmarks|examples|docs)/[\w/.-]*\w)", text):
        assert (ROOT / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("command", ["make demo", "make test", "make api", "make model"])
def test_named_make_targets_exist(command: str) -> None:
    target = command.removeprefix("make ")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_named_extras_exist() -> None:
    known = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    )
    for page in PAGES:
        for extras in re.findall(r"(?:'|`)(?:\.|gtr-deploy)\[([\w,-]+)\]", page.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= known, f"{page.name}: {extras}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_the_python_example_runs(digits_bundle: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(example.replace("bundles/mar-digits-fp32", str(digits_bundle)), names)
    assert getattr(names["images"], "shape", None) == (2, 32, 32, 3)
