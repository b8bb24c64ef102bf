"""What the calibration tests share: the shipped model with what one short calibration saw of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gtr_deploy.calibration.collect import Collected
from gtr_deploy.calibration.probes import Probes
from gtr_deploy.calibration.ranges import Range, layer_ranges
from gtr_deploy.runtime.models.architecture import Architecture
from gtr_deploy.runtime.sampling.plan import SamplingPlan


@dataclass(frozen=True)
class Calibrated:
    """The shipped model's graphs, what a calibration saw of them, and calls of other images to compare on."""

    architecture: Architecture
    graphs: dict[str, Path]
    plan: SamplingPlan
    collected: Collected
    probes: Probes

    def ranges(self, flavour: str) -> dict[str, Range]:
        """Of each flavour's own default method."""
        if flavour == "fp8":
            return layer_ranges(self.collected.all, "max", True, 100)
        return layer_ranges(self.collected.all, "mse", flavour == "tensorrt", 100)
