"""What a graph may differ by from its torch reference. [ours]"""

from __future__ import annotations

import math

from ...runtime.bundle.engine_sets import FLAVOURS
from ...runtime.bundle.reader import Bundle
from ...runtime.errors import BundleError
from ...runtime.models.graphs import IMAGE_TOLERANCES, QUANTISED, GraphSpec

CALIBRATED_MARGIN = 1.5
"""A quantised backbone may be off by this much more than its calibration measured, since verification calls it with
other inputs. Saturated products of 8-bit weights, which a backend may bring about, are six times as far off."""

LARGEST = 0.25
"""No calibration's word is taken for more."""


def graph_limit(spec: GraphSpec, bundle: Bundle, precision: str, engine: str) -> tuple[float, str]:
    """Largest relative error of a graph's outputs, and where it comes from if it is not the fixed one.

    What quantising costs z depends on the model's depth and weights. Calibration has measured it and has held it to
    whole images, so that its figure counts where the images' gate held with it.

    Args:
        precision: of the torch reference.
        engine: that runs the graph; int8 bundles have a flavour for CPUs and one for TensorRT.
    """
    limit = (spec.tolerances if precision == bundle.precision else spec.against_fp32)[bundle.precision]
    if spec.kind != "backbone" or bundle.precision not in QUANTISED:
        return limit, ""
    flavour = "fp8" if bundle.precision == "fp8" else "tensorrt" if engine in FLAVOURS else "cpu"
    measured = _calibrated_error(bundle, flavour)
    if measured is None or CALIBRATED_MARGIN * measured <= limit:
        return limit, ""
    return min(CALIBRATED_MARGIN * measured, LARGEST), f"calibration measured {measured:.2g}"


def _calibrated_error(bundle: Bundle, flavour: str) -> float | None:
    """The error of z that the bundle's calibration reports; None if there is no report that can be trusted."""
    try:
        found = bundle.read_report("calibration")["flavours"][flavour]
        error, images = float(found["errors"]["z"]), float(found["median_image_error"])
    except (BundleError, KeyError, TypeError, ValueError):
        return None
    return error if math.isfinite(error) and images <= IMAGE_TOLERANCES[bundle.precision] else None
