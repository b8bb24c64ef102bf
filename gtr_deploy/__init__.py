"""Deploys masked-autoregressive image generators with the GtR two-stage sampler.

from gtr_deploy import Pipeline

pipeline = Pipeline.load("bundles/mar-digits-fp32")
pipeline.generate([3, 7], seeds=[0, 1], plan="gtr").images
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime.pipeline import Pipeline

__all__ = ["Pipeline", "__version__"]
__version__ = _version("gtr-deploy")


def __getattr__(name: str) -> Any:
    # On demand, so that importing any part of the package does not import the sampler.
    if name == "Pipeline":
        from .runtime.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
