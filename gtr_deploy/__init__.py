"""Deploys masked-autoregressive image generators with the GtR two-stage sampler.

from gtr_deploy import Pipeline

pipeline = Pipeline.load("bundles/mar-digits-fp32")
pipeline.generate([3, 7], seeds=[0, 1], plan="gtr").images
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime.pipeline import Pipeline

    __version__: str

__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # On demand, so that importing any part of the package does not import the sampler.
    if name == "Pipeline":
        from .runtime.pipeline import Pipeline

        return Pipeline
    if name == "__version__":
        from importlib.metadata import version

        return version("gtr-deploy")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
