"""The common style of the plots in the reports of runs and sweeps, and how they become SVG.

A plot scales with the page, so it is drawn about as wide as a phone shows it, in which its text is
readable. It has no background, and its grays are CSS variables with a default, so a page in dark
colors can set them. matplotlib is imported only when a plot is drawn. Figures are made without
pyplot, so there is no global state and no display.
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqtrain.common.files import atomic_write
from hqqtrain.report.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

COLORS = {"full precision": "#5b6b7f", "quantized": "#e07b39", "trained": "#1f8a70"}
"""Color of each model, by its name in `MODEL_NAMES`."""

MUTED, GRID = "#5b6b7f", "#e4e8ee"
"""Colors of text and of grid lines."""

WIDE, NARROW = (4.6, 3.3), (3.4, 2.2)
"""Sizes of plots in inches: a third of a desktop's page, and a quarter. A phone shows one a row."""

LOG_RANGE = 10.0
"""An axis is logarithmic if the largest value is more than this many times the smallest."""

_CSS_VARIABLES = {MUTED: "--muted", GRID: "--line"}

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def new_figure(size: tuple[float, float] = WIDE) -> tuple["Figure", "Axes"]:
    """Return a figure of the given size in inches, and its axes, in the common style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED, labelsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=MUTED, fontsize=10.5)
    return figure, axes


def scale_axis(axes: "Axes", name: str, values: Iterable[float]) -> None:
    """Make the axis `name` (x or y) of `axes` logarithmic if the range of `values` asks for it.

    Its labels are plain numbers, 1, 2 and 5 times a power of ten on a logarithmic axis of less than
    three decades.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{name}axis")
    values = list(values)
    if 0 < LOG_RANGE * min(values, default=0) < max(values, default=0):
        getattr(axes, f"set_{name}scale")("log")
        is_short = max(values) < 1000 * min(values)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_short else (1,), numticks=8))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def short_number(value: float) -> str:
    """Format the number at a tick: thousands as 1,200, tiny and huge ones as 2e-06."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def add_legend(axes: "Axes", **options: Any) -> "Legend":
    """Add and return a legend above the plot, where it covers no data."""
    columns = min(2, len(axes.get_legend_handles_labels()[0]))
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9.5,
        labelcolor=MUTED, borderaxespad=0.2, columnspacing=1.4, handlelength=1.6, **options,
    )  # fmt: skip
    legend.set_alignment("left")
    legend.get_title().set(color=MUTED, fontsize=9.5)
    return legend


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write `figure` to `path` atomically, as PNG or SVG by its suffix, and return `path`."""
    if path.suffix == ".svg":
        return atomic_write(path, render_svg(figure, path.stem))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=160, facecolor="white")
    return atomic_write(path, image.getvalue())


def render_svg(figure: "Figure", name: str) -> str:
    """Return `figure` as an SVG element that has the width of its place on the page.

    The same figure always gives the same text. Letters stay text. Names of elements start with a
    hash of `name`, so the plots of a page do not refer to each other's parts.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    return _compact(text.getvalue())


def _compact(svg: str) -> str:
    """Drop the fixed size, unused names and repeated fonts, and put in the CSS variables."""
    svg = svg[svg.index("<svg ") :]
    root, _, content = svg.partition(">")
    (view_box,) = re.findall(r'viewBox="([\d. -]+)"', root)
    root = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view_box}" font-family="{_FONT}" stroke-linejoin="round"'
    )
    # The style sheet of an SVG element in a page would apply to the whole page.
    content = re.sub(r"<style[^<]*</style>", "", content, count=1)
    content = re.sub(r"<defs>\s*</defs>", "", content)
    content = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", content)
    content = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", content)
    content = re.sub(r" font-family: [^;\"]+;?", "", content)
    content = re.sub(r"\n\s*", "\n", content)
    for color, variable in _CSS_VARIABLES.items():
        content = content.replace(color, f"var({variable}, {color})")
    return f"{root}>{content}".strip() + "\n"


def plot_label(text: str, length: int = 60) -> str:
    """Return `text` for a plot: the end of it, on one line, without control characters."""
    text = " ".join(printable(text).split())
    return text if len(text) <= length else "…" + text[1 - length :]
