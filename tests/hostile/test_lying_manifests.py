"""Numbers of the right type and in range that are not the graphs': no pictures may be ruined without verify's word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

pytestmark = pytest.mark.hostile


def _model(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["model"].update(changes)


def _decoder(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["model"]["decoder"].update(changes)


def _classes(manifest: dict[str, Any]) -> None:
    manifest["model"]["classes"] = 20
    manifest["conditioning"]["class_names"] *= 2


@pytest.mark.parametrize(
    "lie",
    [
        _classes, _model(depth=7), _model(heads=8), _model(head_depth=5), _model(head_width=96), _model(buffer=8),
        _decoder(scale=2.0), _decoder(shift=0.5),
        lambda manifest: manifest["precision"].update(name="fp16"),
        lambda manifest: manifest["precision"].update(name="bf16"),
        lambda manifest: manifest["precision"].update(name="int8"),
    ],
)  # fmt: skip
def test_verify_finds_it(own_bundle: Path, export_cli: Callable[..., Result], lie: Callable[[Any], Any]) -> None:
    path = own_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    lie(manifest)
    path.write_text(json.dumps(manifest))
    result = export_cli("verify", own_bundle, "--images", "1", "--plans", "gtr-fast")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "unforeseen" not in result.stderr
