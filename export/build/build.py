"""gtr-export build: from a request to a bundle, whatever its precision. Importing this module does not import torch."""

from __future__ import annotations

from ...runtime.commands.console import Reporter
from ...runtime.models.graphs import QUANTISED
from .float_bundle import build_float
from .own_model import resolved
from .request import BuildRequest, BuildResult


def build(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """Builds a bundle, or finds that it is already there.

    Raises:
        UsageError: see :meth:`BuildRequest.check` and :func:`~.own_model.resolved`.
        GtrError: weights are missing or wrong, the folder is in the way, or another build is writing it.
    """
    request = resolved(request, reporter)
    if request.precision not in QUANTISED:
        return build_float(request, reporter)
    from .quantised import build_quantised  # needs onnx

    return build_quantised(request, reporter)
