"""Install lines name something that exists: extras of this project, and for whoever has it installed, this project."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
CODE = [path for part in ("runtime", "export", "calibration") for path in sorted((ROOT / part).rglob("*.py"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _named(paths: list[Path], package: str) -> dict[str, str]:
    """Extra to the file that names it."""
    found = {}
    for path in paths:
        for extras in re.findall(rf"{package}\[([a-z0-9,-]+)\]", path.read_text(encoding="utf-8")):
            found |= dict.fromkeys(extras.split(","), path.name)
    return found


def test_every_extra_is_declared() -> None:
    named = _named(CODE, "gtr-deploy") | _named(PAGES, r"\.")
    assert {"cpu", "openvino", "tensorrt", "export", "plot", "evaluate"} <= set(named)
    assert {extra: place for extra, place in named.items() if extra not in EXTRAS} == {}


def test_pages_install_from_the_checkout() -> None:
    """PyPI has no gtr-deploy; a page is read before there is one on the machine."""
    assert set(_named(PAGES, "gtr-deploy").values()) <= {"install.md"}


def test_what_commands_print_needs_no_index_for_this_package(tmp_path: Path) -> None:
    """They print ``gtr-deploy[extra]``: pip takes the extras of what is installed, wherever it came from. Real pip,
    without an index, far from the checkout."""
    pytest.importorskip("pip")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "gtr-deploy[cpu,export]"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"already satisfied: onnxruntime>=.*\(from gtr-deploy\[cpu,export\]\)", result.stdout)
