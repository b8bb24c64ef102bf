"""The warning about timesteps up to 999: small trained models get it, settings that they bear do not cause it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from golden import WEIGHT_SETS, load_case, torch_backend

from gtr_deploy.export.verify import respacing
from gtr_deploy.export.verify import verify as verify_module
from gtr_deploy.export.verify.report import Report
from gtr_deploy.export.verify.respacing import LIMIT, Respacing, measure_respacing
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.models.class_conditioner import DIGITS, ClassConditioner
from gtr_deploy.runtime.pipeline import Pipeline


@pytest.mark.parametrize("weight_set", list(WEIGHT_SETS))
def test_models_that_cannot_bear_it(weight_set: str) -> None:
    architecture = load_case(WEIGHT_SETS[weight_set]).architecture
    found = measure_respacing(torch_backend(weight_set), architecture, ClassConditioner(DIGITS))
    assert found.sensitive
    assert found.ratio > 50 * LIMIT


def test_the_shipped_model_on_both_sides_of_the_limit(
    digits_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, architecture = digits_pipeline.backend, digits_pipeline.architecture
    found = measure_respacing(backend, architecture, digits_pipeline.conditioner)  # type: ignore[arg-type]
    assert found.ratio > 50 * LIMIT
    assert 0.4 < found.capped < 1.2  # about the size of the tokens it was trained on
    for harmless in (990, 975, 925):
        monkeypatch.setattr(respacing, "ORIGINAL", harmless)
        found = measure_respacing(backend, architecture, digits_pipeline.conditioner)  # type: ignore[arg-type]
        assert abs(found.ratio - 1) < 0.05
        assert not found.sensitive
        assert found.warning(999) is None


def test_values_that_are_not_finite_count_as_sensitive() -> None:
    found = Respacing(float("nan"), 0.7, float("inf"), True)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["ratio"] is None
    assert "--max-timestep 950" in (found.warning(999) or "")
    assert "leave it so" in (found.warning(950) or "")


def test_verify_warns_and_writes_it_down(
    own_bundle: Path, export_cli: Callable[..., Result], run_cli: Callable[..., Result], tmp_path: Path
) -> None:
    result = export_cli("verify", own_bundle, "--plans", "gtr-fast", "--images", 1)
    assert result.exit_code == 0, result.output
    assert "warning: this checkpoint is sensitive to the respacing" in result.stderr
    section = Bundle.load(own_bundle).read_report("parity")["respacing"]
    assert section["sensitive"] is True
    assert section["timesteps"] == [999, 950]
    for largest, warned in ((950, False), (999, True)):
        options = ["--classes", "3", "--plan", "gtr-fast", "--max-timestep", largest, "--out", tmp_path / str(largest)]
        result = run_cli("generate", own_bundle, *options)
        assert result.exit_code == 0
        assert ("checkpoint gives noise above 950: --max-timestep 950 avoids it" in result.stderr) is warned


def test_random_weights_get_no_warning(own_bundle: Path, digits_pipeline: Pipeline) -> None:
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["source"]["random_weights"] = 0
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    report = Report("mar-digits", "fp32", "onnxruntime cpu")
    verify_module._respacing(digits_pipeline.backend, Bundle.load(own_bundle), report, Reporter(quiet=True), None)  # type: ignore[arg-type]
    assert report.respacing is None
    assert report.to_json()["respacing"] is None
