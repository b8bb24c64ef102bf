"""Deployment side: runs a bundle with NumPy and one engine library, without PyTorch.

from gtr_deploy.runtime import Pipeline

pipeline = Pipeline.load("bundles/mar-digits-fp32")
pipeline.generate([3, 7], seeds=[0, 1], plan="gtr").images
"""

import os

# ONNX Runtime for Linux and macOS reports itself over the network and keeps a device id below the home folder unless
# this is set before it starts. Who wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

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
