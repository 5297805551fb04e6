"""The plots of a run's metrics. matplotlib is imported only when a plot is drawn."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from hqqtrain.report.style import (
    COLORS,
    MUTED,
    NARROW,
    WIDE,
    add_legend,
    new_figure,
    scale_axis,
    short_number,
)
from hqqtrain.rundir.schema import GLOBAL_STEP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
"""The rows of metrics.jsonl, one per optimizer step."""

STEP_METRICS = {
    "train/learning_rate": "Learning rate",
    "train/grad_norm": "Gradient norm",
    "train/tokens_per_second": "Tokens per second",
    "memory/peak_gib": "Peak memory (GiB)",
}
"""Metrics of every step that get a plot of their own -> its heading."""

_FROM_ZERO = ("train/tokens_per_second", "memory/peak_gib")
"""Metrics whose axis starts at 0, so that a small change looks small."""

_MAX_WINDOWS = 60
"""Largest number of points in a smoothed curve."""

_MAX_POINTS = 600
"""Largest number of points in an exact curve: more than a page has pixels for."""


def best_step(rows: Rows) -> int | None:
    """Return the step with the lowest held-out loss; None if only the result was measured."""
    held_out = [(loss, step) for step, loss in _series(rows, "eval/loss") if step > 0]
    return min(held_out)[1] if len(held_out) > 1 else None


def plot_loss(rows: Rows) -> "Figure | None":
    """Plot the training loss, and the held-out loss if it was measured; None without training."""
    train, held_out = _series(rows, "train/loss"), _series(rows, "eval/loss")
    if not train:
        return None
    figure, axes = new_figure()
    _plot_smoothed(axes, train, "training, smoothed")
    if held_out:
        points = zip(*_thin(held_out), strict=True)
        axes.plot(*points, "o-", color=COLORS["trained"], markersize=4, label="held-out")
    if (best := best_step(rows)) is not None:
        label = f"lowest held-out, step {best:,}"
        axes.axvline(best, color=MUTED, linestyle=":", linewidth=1.2, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    _format_steps(axes)
    add_legend(axes)
    return figure


def plot_step_metric(rows: Rows, name: str) -> "Figure | None":
    """Plot a metric over the optimizer steps; None if it was not logged."""
    series = _series(rows, name)
    if not series:
        return None
    figure, axes = new_figure(NARROW)
    if name == "train/learning_rate":
        axes.plot(*zip(*_thin(series), strict=True), color=COLORS["quantized"])
    else:
        _plot_smoothed(axes, series, "smoothed")
    values = [value for _, value in series]
    if name in _FROM_ZERO:
        scale_axis(axes, "y", ())
        axes.set_ylim(0, 1.1 * max(values) or 1)
    else:
        # A warmup from zero must not make the schedule's axis logarithmic.
        scale_axis(axes, "y", values if name == "train/grad_norm" else ())
    axes.set_xlabel("optimizer step")
    _format_steps(axes)
    return figure


def plot_perplexities(perplexities: Mapping[str, float]) -> "Figure | None":
    """Plot one bar per model with its value on top; None if nothing was measured."""
    if not perplexities:
        return None
    figure, axes = new_figure(WIDE)
    colors = [COLORS.get(name, MUTED) for name in perplexities]
    scale_axis(axes, "y", perplexities.values())
    bars = axes.bar(list(perplexities), list(perplexities.values()), color=colors, width=0.6)
    axes.bar_label(bars, fmt="{:,.2f}", padding=3, color=MUTED, fontsize=10.5)
    axes.margins(y=0.15)
    axes.set(ylabel="perplexity on held-out text")
    axes.tick_params(axis="x", length=0, labelsize=10.5)
    return figure


def _plot_smoothed(axes: "Axes", series: Sequence[tuple[int, float]], label: str) -> None:
    """Plot a curve of every step in a pale color, and its smoothed one over it."""
    color = COLORS["quantized"]
    axes.plot(*zip(*_thin(series), strict=True), color=color, alpha=0.35, linewidth=1)
    axes.plot(*zip(*_smooth(series), strict=True), color=color, label=label)


def _format_steps(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: short_number(step)))


def _series(rows: Rows, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a metric, for the rows that have a number."""
    pairs = ((row[GLOBAL_STEP], row.get(name)) for row in rows)
    return [(step, value) for step, value in pairs if isinstance(value, int | float)]


def _thin(series: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return about `_MAX_POINTS` points at equal distances, always with the last one."""
    stride = ceil(len(series) / _MAX_POINTS)
    return [*series[:-1:stride], series[-1]]


def _smooth(series: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Average steps and values over at most `_MAX_WINDOWS` consecutive windows of equal length."""
    length = ceil(len(series) / _MAX_WINDOWS)
    windows = [series[start : start + length] for start in range(0, len(series), length)]
    return [
        (sum(step for step, _ in w) / len(w), sum(value for _, value in w) / len(w))
        for w in windows
    ]
