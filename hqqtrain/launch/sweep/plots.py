"""The plots of a sweep: perplexity against what it costs, and the jobs that nothing beats."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hqqtrain.launch.sweep.results import TableRow
from hqqtrain.report.style import COLORS, MUTED, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LETTERS = 28
"""So long a label of a point may be."""


class CostPoint(NamedTuple):
    """A model that was measured: `cost` in the unit of the axis, by a label for its job."""

    cost: float
    perplexity: float
    label: str = ""


class CostAxis(NamedTuple):
    """What is laid off to the right, of the quantized model and of the trained one."""

    label: str
    quantized: Callable[[dict[str, float | None]], float | None]
    final: Callable[[dict[str, float | None]], float | None]


def _seconds(figures: dict[str, float | None]) -> float | None:
    quantize, train = figures["quantize_seconds"], figures["train_seconds"]
    return None if quantize is None or train is None else quantize + train


AXES = {
    "bits": CostAxis(
        "bits per weight", lambda f: f["bits_per_weight"], lambda f: f["bits_per_weight"]
    ),
    "seconds": CostAxis("seconds to quantize and train", lambda f: f["quantize_seconds"], _seconds),
    "memory": CostAxis(
        "peak memory (GiB)",
        lambda f: f["peak_memory_gib"] if f["train_seconds"] is None else None,
        lambda f: f["peak_memory_gib"],
    ),
}


def pareto_front(points: Sequence[CostPoint]) -> list[CostPoint]:
    """Those that no other beats: none is as good in one and better in the other. By cost.

    Points that are equal in both beat each other in nothing, so all of them stay.
    """
    front: list[CostPoint] = []
    for point in sorted(points):
        if not front or point.perplexity < front[-1].perplexity or point[:2] == front[-1][:2]:
            front.append(point)
    return front


def cost_figure(rows: Sequence[TableRow], axis: CostAxis) -> "Figure | None":
    """Perplexity against the cost of `axis`; None where no job has both."""
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
    _scale(axes, [*quantized, *trained])
    axes.set(xlabel=axis.label, ylabel="perplexity on held-out text")
    axes.legend(frameon=False, title=_title(rows))
    return figure


def _points(
    rows: Sequence[TableRow], cost: Callable[[dict[str, float | None]], float | None], name: str
) -> list[CostPoint]:
    found = ((cost(row.figures), row.figures[name], _label(row)) for row in rows)
    return [CostPoint(c, p, label) for c, p, label in found if c is not None and p is not None]


def _draw_front(axes: Any, front: Sequence[CostPoint]) -> None:
    costs, perplexities, _ = zip(*front, strict=True)
    axes.plot(costs, perplexities, drawstyle="steps-post", color=MUTED, linewidth=1,
              label="Pareto front", zorder=1)  # fmt: skip
    for point in front:
        axes.annotate(
            point.label, point[:2], xytext=(1, 5), textcoords="offset points", fontsize=8,
            color=MUTED, rotation=40, parse_math=False,
        )  # fmt: skip


def _draw_full_precision(axes: Any, rows: Sequence[TableRow]) -> None:
    """A line for each model that there was: one, where the sweep is over other things."""
    found = {row.figures["perplexity_full_precision"] for row in rows} - {None}
    for number, value in enumerate(sorted({round(v, 3) for v in found if v is not None})):
        label = "full precision" if number == 0 else None
        axes.axhline(
            value, color=COLORS["full precision"], linestyle="--", linewidth=1, label=label
        )


def _scale(axes: Any, points: Sequence[CostPoint]) -> None:
    """Logarithmic where the values are of several orders."""
    from matplotlib.ticker import StrMethodFormatter

    for values, set_scale, axis in (
        ([p.cost for p in points], axes.set_xscale, axes.xaxis),
        ([p.perplexity for p in points], axes.set_yscale, axes.yaxis),
    ):
        if 0 < 20 * min(values) < max(values):
            set_scale("log")
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _label(row: TableRow) -> str:
    text = " · ".join(row.swept.values())
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"


def _title(rows: Sequence[TableRow]) -> str:
    """What the labels are made of: the swept keys, without their groups."""
    keys = " · ".join(key.rpartition(".")[2] for key in rows[0].swept)
    return f"labels: {keys}" if keys else ""
