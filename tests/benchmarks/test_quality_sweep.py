"""benchmarks/quality.py on small configurations: it goes on where it stopped, and its charts can be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quality as script
import quality_configurations
import quality_figures as figures
from commands import runner
from PIL import Image

from gtr_deploy.runtime.errors import UsageError
from gtr_deploy.runtime.models.families import known_models
from gtr_deploy.runtime.sampling.named import named_plan

SMALL: dict[str, Any] = {
    "stage_steps": (2, 1, 1),
    "generation_diffusion": (8, 8),
    "reconstruction_diffusion": 4,
    "fts_diffusion": 8,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[quality_configurations.Configuration, ...]:
    """Three configurations of four short AR steps."""
    entry = quality_configurations.Configuration
    chosen = (
        entry("preset", "gtr", SMALL),
        entry("fts", "fts none", {**SMALL, "fts": "none"}),
        entry("preset", "gtr-compact", SMALL, "gtr-compact"),
    )
    for module in (script, figures):
        monkeypatch.setattr(module, "CONFIGURATIONS", chosen)
    monkeypatch.setattr(figures, "FAILURES", ("gtr", "gtr-compact"))
    monkeypatch.setattr(script, "PAIRS", (("gtr-compact", "fts none"),))
    return chosen


def test_configurations_fit_the_model_and_differ() -> None:
    entries = quality_configurations.CONFIGURATIONS
    assert entries[0].name == script.BASE
    assert len({entry.name for entry in entries}) == len(entries)
    model = known_models()["mar-digits"]
    plans = [
        named_plan(entry.preset, model.architecture, model.plan_defaults, entry.overrides).settings for entry in entries
    ]
    assert len({json.dumps({**plan.to_json(), "name": ""}) for plan in plans}) == len(entries)
    assert {*figures.FAILURES, *figures.SHOWN} <= {entry.name for entry in entries}
    assert {factor for _, _, factors in figures.QUESTIONS for factor in factors} == {e.factor for e in entries}
    assert {name for pair in quality_configurations.PAIRS for name in pair} <= {entry.name for entry in entries}


@pytest.mark.usefixtures("small")
def test_it_goes_on_where_it_stopped(digits_bundle: Path, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    arguments = [str(digits_bundle), "--results", str(results), "--pictures", str(tmp_path / "p")]

    def run(*more: str) -> Any:
        return runner().invoke(script.main, [*arguments, *more])

    first = run("--images", "20", "--blocks", "1")
    assert first.exit_code == 0, first.output
    assert "3/3 block 0 gtr-compact" in first.output
    whole = results.read_text()
    lines = whole.splitlines()
    assert len(lines) == 5
    assert json.loads(lines[4])["pair"] == ["gtr-compact", "fts none"]
    assert set(json.loads(lines[0])["environment"]) >= {"bundle", "images", "threads", "cpu", "onnxruntime", "numpy"}
    assert json.loads(lines[1])["difference"] == {}
    low, high = json.loads(lines[3])["difference"]["frechet_distance"][1:]
    assert low < high

    assert run("--images", "20", "--blocks", "1").output == ""
    results.write_text("\n".join(lines[:4])[:-40])  # killed while it wrote
    again = run("--images", "20", "--blocks", "1")
    assert "1/1 block 0 gtr-compact" in again.output
    for name in ("figures", "pooled", "difference"):
        assert json.loads(results.read_text().splitlines()[3])[name] == json.loads(lines[3])[name]

    second = run("--images", "20", "--blocks", "2")
    assert second.exit_code == 0, second.output
    *_, last, pair = map(json.loads, results.read_text().splitlines())
    assert last["block"] == 1
    assert last["pooled_blocks"] == [0, 1]
    assert pair["images"] == 40
    refused = run("--images", "30")
    assert isinstance(refused.exception, UsageError)
    assert "another bundle or --images" in str(refused.exception)

    lines = script.read_lines(results)
    figures.draw_charts(lines, tmp_path / "docs")
    figures.draw_pictures(digits_bundle, lines, tmp_path / "docs")
    for name in ("quality", "quality-presets", "quality-fts", "quality-failures"):
        with Image.open(tmp_path / "docs" / f"{name}.png") as picture:
            assert picture.width > 300
    rows = figures.rows_of(lines)
    assert [(row.name, row.images) for row in rows] == [("gtr", 40), ("fts none", 40), ("gtr-compact", 40)]
    assert rows[0].difference == {}
    assert figures.tables(lines).splitlines()[2].count("|") == 11


def test_stored_results_can_be_drawn() -> None:
    rows = figures.rows_of(script.read_lines(script.RESULTS))
    assert len(rows) == len(quality_configurations.CONFIGURATIONS)
    fast = next(row for row in rows if row.name == "gtr-fast")
    assert fast.figures["frechet_distance"].value == pytest.approx(3.20, abs=0.005)
