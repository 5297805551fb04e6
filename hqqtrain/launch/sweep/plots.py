"""The plots of a sweep: perplexity against a cost, with the Pareto front of the jobs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hqqtrain.launch.sweep.results import TableRow
from hqqtrain.report.style import (
    COLORS,
    MUTED,
    add_legend,
    new_figure,
    plot_label,
    scale_axis,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Mapping[str, float | None]
"""A job's metrics by their names in `results.COLUMNS`; None where one was not measured."""

_MAX_LABEL_LENGTH = 28
"""Characters; longer labels of points are truncated."""


_LABEL_POSITIONS = (
    (6, 3, "left", "bottom"), (-6, 3, "right", "bottom"), (6, -3, "left", "top"),
    (-6, -3, "right", "top"), (0, 8, "center", "bottom"), (0, -8, "center", "top"),
    (4, 16, "center", "bottom"), (4, -16, "center", "top"),
)  # fmt: skip
"""Places of a label beside its point: its offset in points, and its alignment."""


class CostPoint(NamedTuple):
    """A measured model: its `cost` in the unit of the axis, its perplexity, and its job's label."""

    cost: float
    perplexity: float
    label: str = ""


class CostAxis(NamedTuple):
    """A cost on the horizontal axis: its label, and how to compute it from a job's metrics.

    `quantized` returns the cost of the quantized model, `final` that of the trained model. Both
    return None if the job has not measured it.
    """

    label: str
    quantized: Callable[[Metrics], float | None]
    final: Callable[[Metrics], float | None]


def _total_seconds(metrics: Metrics) -> float | None:
    quantize, train = metrics["quantize_seconds"], metrics["train_seconds"]
    return None if quantize is None or train is None else quantize + train


# The peak memory of a job that trains includes the training, so it is not a cost of quantization.
AXES = {
    "bits": CostAxis(
        "bits per weight", lambda m: m["bits_per_weight"], lambda m: m["bits_per_weight"]
    ),
    "seconds": CostAxis(
        "seconds to quantize and train", lambda m: m["quantize_seconds"], _total_seconds
    ),
    "memory": CostAxis(
        "peak memory (GiB)",
        lambda m: m["peak_memory_gib"] if m["train_seconds"] is None else None,
        lambda m: m["peak_memory_gib"],
    ),
}


def pareto_front(points: Sequence[CostPoint]) -> list[CostPoint]:
    """Return the points that no other point dominates, sorted by cost.

    A point dominates another if it is at least as good in cost and in perplexity, and better in
    one of them. Points that are equal in both do not dominate each other, so all of them stay.
    """
    front: list[CostPoint] = []
    for point in sorted(points):
        if not front or point.perplexity < front[-1].perplexity or point[:2] == front[-1][:2]:
            front.append(point)
    return front


def plot_cost(rows: Sequence[TableRow], axis: CostAxis) -> "Figure | None":
    """Plot perplexity against the cost of `axis`; return None if no job has measured both."""
    quantized = _points(rows, axis.quantized, "perplexity_quantized")
    trained = _points(rows, axis.final, "perplexity_final")
    points = [*quantized, *trained]
    if not points:
        return None
    figure, axes = new_figure((4.6, 4.2))
    for name, some in (("quantized", quantized), ("trained", trained)):
        if some:
            costs, perplexities, _ = zip(*some, strict=True)
            axes.plot(costs, perplexities, "o", color=COLORS[name], label=name, markersize=5.5)
    front = pareto_front(points)
    costs, perplexities, _ = zip(*front, strict=True)
    style: dict[str, Any] = {"color": MUTED, "linewidth": 1, "zorder": 1}
    axes.plot(costs, perplexities, drawstyle="steps-post", label="Pareto front", **style)
    lines = _draw_full_precision(axes, rows)
    scale_axis(axes, "x", [point.cost for point in points])
    scale_axis(axes, "y", [point.perplexity for point in points])
    axes.margins(x=0.1, y=0.08)
    axes.set(xlabel=axis.label, ylabel="perplexity on held-out text")
    legend = add_legend(axes, title=_legend_title(rows))
    _label_points(figure, axes, front, points, [legend, *lines])
    return figure


def _points(
    rows: Sequence[TableRow], cost: Callable[[Metrics], float | None], name: str
) -> list[CostPoint]:
    values = ((cost(row.metrics), row.metrics[name], _label(row)) for row in rows)
    return [CostPoint(c, p, label) for c, p, label in values if c is not None and p is not None]


def _label_points(
    figure: "Figure", axes: "Axes", labeled: Sequence[CostPoint], points: Sequence[CostPoint],
    obstacles: Iterable["Artist"],
) -> None:  # fmt: skip
    """Write the labels beside the points, where they cover no point, obstacle or other label.

    A point without room around it gets no label. The table of the sweep has all values.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # computes the layout, from which the positions follow
    centers = axes.transData.transform([point[:2] for point in points])
    occupied = [Bbox([center - 4, center + 4]) for center in centers]
    occupied += [obstacle.get_window_extent().padded(1) for obstacle in obstacles]
    for point in labeled:
        for x, y, horizontal, vertical in _LABEL_POSITIONS:
            text = axes.annotate(
                point.label, point[:2], xytext=(x, y), textcoords="offset points",
                ha=horizontal, va=vertical, color=MUTED, fontsize=9.5, parse_math=False,
            )  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent()
            is_inside = axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            is_inside &= axes.bbox.y0 <= box.y0
            if is_inside and not any(box.overlaps(other) for other in occupied):
                occupied.append(box)
                break
            text.remove()


def _draw_full_precision(axes: "Axes", rows: Sequence[TableRow]) -> list["Artist"]:
    """Draw one line per full-precision model; a sweep that does not vary the model has one line."""
    values = {row.metrics["perplexity_full_precision"] for row in rows}
    style: dict[str, Any] = {"color": COLORS["full precision"], "linestyle": "--", "linewidth": 1}
    return [
        axes.axhline(value, label="full precision" if index == 0 else None, **style)
        for index, value in enumerate(sorted({round(v, 3) for v in values if v is not None}))
    ]


def _label(row: TableRow) -> str:
    text = " · ".join(plot_label(value, 1000) for value in row.swept_values.values())
    return text if len(text) <= _MAX_LABEL_LENGTH else text[: _MAX_LABEL_LENGTH - 1] + "…"


def _legend_title(rows: Sequence[TableRow]) -> str:
    """Explain the labels of the points: the names of the swept keys, without their groups."""
    keys = " · ".join(key.rpartition(".")[2] for key in rows[0].swept_values)
    return f"labels: {keys}" if keys else ""
