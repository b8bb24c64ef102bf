"""Deployment side: runs a bundle with NumPy and one engine library, without PyTorch.

from gtr_deploy.runtime import Pipeline

pipeline = Pipeline.load("bundles/mar-digits-fp32")
pipeline.generate([3, 7], seeds=[0, 1], plan="gtr").images
"""

from .bundle.reader import Bundle
from .errors import BackendError, BundleError, GtrError, PlanError, UsageError
from .pipeline import Generation, Pipeline
from .sampling.plan import PRESETS, PlanSettings, SamplingPlan

__all__ = [
    "PRESETS",
    "BackendError",
    "Bundle",
    "BundleError",
    "Generation",
    "GtrError",
    "Pipeline",
    "PlanError",
    "PlanSettings",
    "SamplingPlan",
    "UsageError",
]
