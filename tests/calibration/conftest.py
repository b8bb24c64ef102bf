"""Fixture: one short calibration of the shipped model, and recorded calls to compare on."""

from __future__ import annotations

from pathlib import Path

import pytest
from calibrated import Calibrated

from gtr_deploy.calibration.collect import collect
from gtr_deploy.calibration.data import calibration_images
from gtr_deploy.calibration.probes import record
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.sampling.plan import preset, resolve


@pytest.fixture(scope="session")
def calibrated(digits_bundle: Path) -> Calibrated:
    bundle = Bundle.load(digits_bundle)
    graphs, architecture = bundle.graph_paths(), bundle.architecture
    plan = resolve(preset("gtr-fast", architecture, bundle.plan_defaults), architecture)
    images = calibration_images(architecture, bundle.conditioner, 10)
    collected = collect(architecture, graphs, plan, images, Reporter(quiet=True), batch_size=10, threads=1)
    compared = calibration_images(architecture, bundle.conditioner, 4, [3, 7, 5, 2], first_seed=0)
    probes = record(architecture, graphs, plan, compared, threads=1)
    return Calibrated(architecture, graphs, plan, collected, probes)
