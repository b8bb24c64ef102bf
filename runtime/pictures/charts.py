"""What all charts share: a figure, its style, a PNG written whole. Needs matplotlib, which is an extra.

No pyplot and no global settings: a figure belongs to who makes it. What a chart shows is known to its caller.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GtrError, UsageError
from ..files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY, DARK, LINE = "#8A8D91", "#26282E", "#DEDEDA"

INSTALL = "pip install 'gtr-deploy[plot]'"
_DOTS_PER_INCH = 120


def checked_target(path: Path) -> None:
    """Finds out before hours of work whether a chart can be drawn and written at ``path``.

    Raises:
        UsageError: another suffix than .png.
        GtrError: matplotlib is missing, or the folder cannot be made or written to.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path} does not end in .png")
    if find_spec("matplotlib") is None:
        raise GtrError(f"charts need matplotlib, which is not installed; {INSTALL}")
    existed = path.is_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise GtrError(f"--plot {path} cannot be written: {error.strerror or error}") from None


def new_figure(width: float, height: float, title: str, note: str = "") -> Figure:
    """An empty figure.

    Args:
        width, height: inches; text is 10 points high, so 9 inches fill a page.
        note: smaller, under the title: what the marks mean; lines of about 110 characters.

    Raises:
        GtrError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise GtrError(f"charts need matplotlib, which is not installed; {INSTALL}") from None
    lines = note.count("\n") + 1 if note else 0
    layout = ConstrainedLayoutEngine(rect=(0, 0, 0.99, 1 - (0.42 + 0.2 * lines if note else 0.36) / height))
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    figure.text(0.1 / width, 1 - 0.08 / height, title, va="top", size=12.5, color=DARK, weight="bold")
    figure.text(0.1 / width, 1 - 0.34 / height, note, va="top", size=10, color=DARK)
    return figure


def plain(axes: Axes, grid: str) -> None:
    """Axes without a box, with thin lines across ``x``, ``y`` or ``both``."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.grid(axis=grid, color=LINE, linewidth=0.8)  # pyright: ignore[reportArgumentType]
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=10, labelcolor=DARK)


def save_figure(path: Path, figure: Figure) -> None:
    """Writes the PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH)
