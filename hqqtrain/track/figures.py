"""The common style of all plots of runs and of sweeps.

matplotlib is imported only when a plot is drawn. Figures are made without pyplot, so there is no
global state and no display, and any thread may draw.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqtrain.config.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"full precision": "#5b6b7f", "quantized": "#e07b39", "trained": "#1f8a70"}
MUTED, GRID = "#5b6b7f", "#e4e8ee"


def new_figure(width: float, height: float, lines: int = 0, columns: int = 1, **shared: Any) -> Any:
    """Create a figure in the common style.

    Args:
        width: in inches.
        height: in inches.
        lines: rows of a grid of axes; 0 for a single plot.
        columns: columns of the grid.
        shared: passed on to `Figure.subplots`.

    Returns:
        (figure, axes), or with `lines` (figure, array of axes of shape [lines, columns]).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if lines:
        grid = figure.subplots(lines, columns, squeeze=False, **shared)
        for axes in grid.flat:
            _style(axes)
        return figure, grid
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def _style(axes: "Axes") -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9)


def save_figure(figure: "Figure", path: Path, dpi: int = 130) -> Path:
    """Write `figure` to `path` as PNG, atomically, and return `path`."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    return atomic_write(path, image.getvalue())
