"""The plots of a sweep: perplexity against a cost, with the Pareto front of the jobs."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hqqtrain.launch.sweep.results import TableRow
from hqqtrain.report.style import COLORS, MUTED, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = Mapping[str, float | None]
"""A job's metrics by their names in `results.COLUMNS`; None where one was not measured."""

_MAX_LABEL_LENGTH = 28
"""Characters; longer labels of points are truncated."""


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
    if not (quantized or trained):
        return None
    figure, axes = new_figure(7.2, 4.8)
    for name, points in (("quantized", quantized), ("trained", trained)):
        if points:
            costs, perplexities, _ = zip(*points, strict=True)
            axes.plot(costs, perplexities, "o", color=COLORS[name], label=name, markersize=6)
    _draw_front(axes, pareto_front([*quantized, *trained]))
    _draw_full_precision(axes, rows)
    _set_scales(axes, [*quantized, *trained])
    axes.set(xlabel=axis.label, ylabel="perplexity on held-out text")
    axes.legend(frameon=False, title=_legend_title(rows))
    return figure


def _points(
    rows: Sequence[TableRow], cost: Callable[[Metrics], float | None], name: str
) -> list[CostPoint]:
    values = ((cost(row.metrics), row.metrics[name], _label(row)) for row in rows)
    return [CostPoint(c, p, label) for c, p, label in values if c is not None and p is not None]


def _draw_front(axes: Any, front: Sequence[CostPoint]) -> None:
    costs, perplexities, _ = zip(*front, strict=True)
    style = {"color": MUTED, "linewidth": 1, "label": "Pareto front", "zorder": 1}
    axes.plot(costs, perplexities, drawstyle="steps-post", **style)
    text_style = {"color": MUTED, "fontsize": 8, "rotation": 40, "parse_math": False}
    for point in front:
        axes.annotate(
            point.label, point[:2], xytext=(1, 5), textcoords="offset points", **text_style
        )


def _draw_full_precision(axes: Any, rows: Sequence[TableRow]) -> None:
    """Draw one line per full-precision model; a sweep that does not vary the model has one line."""
    values = {row.metrics["perplexity_full_precision"] for row in rows}
    for index, value in enumerate(sorted({round(v, 3) for v in values if v is not None})):
        label = "full precision" if index == 0 else None
        axes.axhline(
            value, color=COLORS["full precision"], linestyle="--", linewidth=1, label=label
        )


def _set_scales(axes: Any, points: Sequence[CostPoint]) -> None:
    """Use a logarithmic scale on an axis whose values differ by more than a factor of 20."""
    from matplotlib.ticker import StrMethodFormatter

    for values, set_scale, axis in (
        ([p.cost for p in points], axes.set_xscale, axes.xaxis),
        ([p.perplexity for p in points], axes.set_yscale, axes.yaxis),
    ):
        if 0 < 20 * min(values) < max(values):
            set_scale("log")
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _label(row: TableRow) -> str:
    text = " · ".join(row.swept_values.values())
    return text if len(text) <= _MAX_LABEL_LENGTH else text[: _MAX_LABEL_LENGTH - 1] + "…"


def _legend_title(rows: Sequence[TableRow]) -> str:
    """Explain the labels of the points: the names of the swept keys, without their groups."""
    keys = " · ".join(key.rpartition(".")[2] for key in rows[0].swept_values)
    return f"labels: {keys}" if keys else ""
