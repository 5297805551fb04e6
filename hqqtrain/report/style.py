"""The common style of the plots in the reports of runs and sweeps.

matplotlib is imported only when a plot is drawn. Figures are made without pyplot, so there is no
global state and no display, and any thread may draw.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqtrain.common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"full precision": "#5b6b7f", "quantized": "#e07b39", "trained": "#1f8a70"}
"""Color of each model, by its name in `MODEL_NAMES`."""

MUTED, GRID = "#5b6b7f", "#e4e8ee"
"""Colors of secondary text and of grid lines."""


def new_figure(
    width: float, height: float, rows: int = 0, columns: int = 1, **subplot_options: Any
) -> Any:
    """Create a figure in the common style.

    Args:
        width: in inches.
        height: in inches.
        rows: rows of a grid of axes; 0 for a single plot.
        columns: columns of the grid.
        subplot_options: options of `Figure.subplots`, such as `sharex`.

    Returns:
        (figure, axes), or for a grid (figure, array of axes of shape [rows, columns]).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if rows:
        grid = figure.subplots(rows, columns, squeeze=False, **subplot_options)
        for axes in grid.flat:
            _apply_style(axes)
        return figure, grid
    axes = figure.subplots()
    _apply_style(axes)
    return figure, axes


def _apply_style(axes: "Axes") -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9)


def save_figure(figure: "Figure", path: Path, dpi: int = 130) -> Path:
    """Write `figure` to `path` as PNG, atomically, and return `path`."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    return atomic_write(path, image.getvalue())
