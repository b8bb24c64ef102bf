"""The API page says what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_api_page_is_what_make_api_writes() -> None:
    made = runpy.run_path(str(DOCS / "make_api.py"))
    assert (DOCS / "api.md").read_text(encoding="utf-8") == made["page"](), "run: make api"


def test_the_api_page_has_every_public_name_and_no_private_one() -> None:
    made = runpy.run_path(str(DOCS / "make_api.py"))
    lines = made["page"]().splitlines()
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == list(made["public_names"]())
    assert "### Pipeline.generate" in lines
    assert not [line for line in lines if line.startswith("### ") and "._" in line]
