"""The plots of a run's report. matplotlib is imported only when a plot is drawn."""

import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from hqqtrain.report.style import COLORS, GRID, MUTED, new_figure
from hqqtrain.rundir.schema import GLOBAL_STEP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ERROR_LABEL = "relative error   ||W - W'||² / ||W||²"

_MAX_NAMES = 48
"""Largest number of module names that are readable in one plot."""

_MAX_PANELS = 24
"""Largest number of panels that are readable in one figure."""

_MAX_WINDOWS = 60
"""Largest number of points in a smoothed curve."""


def plot_loss(rows: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Plot the training loss, and the held-out loss if it was measured; None without training."""
    train, held_out = _series(rows, "train/loss"), _series(rows, "eval/loss")
    if not train:
        return None
    figure, axes = new_figure(8.0, 4.2)
    axes.plot(*zip(*train, strict=True), color=COLORS["quantized"], alpha=0.3, linewidth=1)
    smoothed = _smooth(train)
    axes.plot(*zip(*smoothed, strict=True), color=COLORS["quantized"], label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=COLORS["trained"], label="held-out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def plot_perplexities(perplexities: Mapping[str, float]) -> "Figure | None":
    """Plot one bar per model with its value on top; None if nothing was measured."""
    if not perplexities:
        return None
    figure, axes = new_figure(5.2, 4.2)
    colors = [COLORS.get(name, MUTED) for name in perplexities]
    # On a linear axis, a bar 20 times smaller than another would not be visible.
    if max(perplexities.values()) > 20 * min(perplexities.values()):
        axes.set_yscale("log")
    bars = axes.bar(list(perplexities), list(perplexities.values()), color=colors, width=0.6)
    axes.bar_label(bars, fmt="{:,.2f}", padding=3)
    axes.margins(y=0.12)
    axes.set(ylabel="perplexity on held-out text")
    axes.tick_params(axis="x", length=0)
    return figure


def plot_layer_errors(errors: Mapping[str, float]) -> "Figure | None":
    """Plot the relative error of every linear layer; None if there are no errors.

    There is one panel per kind of module, such as `mlp.up_proj`, with one bar per decoder layer. A
    model without numbered layers gets one bar per module name instead, largest error first.
    """
    if not errors:
        return None
    kinds = group_by_kind(errors)
    repeated_kinds = sum(len(layers) > 1 for layers in kinds.values())
    has_decoder_layers = repeated_kinds > len(kinds) / 2
    if has_decoder_layers and len(kinds) <= _MAX_PANELS:
        return _plot_panels(kinds)
    return _plot_bars(errors)


def group_by_kind(errors: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Group errors by kind of module, then by decoder layer.

    `model.layers.3.mlp.up_proj` becomes {"mlp.up_proj": {3: error}}. A name without a number
    belongs to layer 0.
    """
    kinds: dict[str, dict[int, float]] = {}
    for name, error in errors.items():
        match = re.search(r"\.(\d+)\.", name)
        kind = name[match.end() :] if match else name
        kinds.setdefault(kind, {})[int(match.group(1)) if match else 0] = error
    return kinds


def _plot_panels(kinds: Mapping[str, Mapping[int, float]]) -> "Figure":
    """Plot one panel per kind; `kinds` is the result of `group_by_kind`."""
    from matplotlib.ticker import MaxNLocator

    columns = 2 if len(kinds) > 1 else 1
    rows = ceil(len(kinds) / columns)
    figure, grid = new_figure(10.0, 0.5 + 1.9 * rows, rows, columns, sharey=True, sharex=True)
    for axes, (kind, layers) in zip(grid.flat, kinds.items(), strict=False):
        axes.bar(list(layers), list(layers.values()), color=COLORS["quantized"], width=0.75)
        axes.set_title(kind, fontsize=10, loc="left", color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.tick_params(labelbottom=True)
        axes.margins(x=0.01)
    for axes in grid.flat[len(kinds) :]:  # the last row may have an unused panel
        axes.set_visible(False)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
    figure.supxlabel("layer", fontsize=10)
    figure.supylabel(_ERROR_LABEL, fontsize=10)
    return figure


def _plot_bars(errors: Mapping[str, float]) -> "Figure":
    """Plot one horizontal bar per module, for the modules with the largest errors."""
    ranked = sorted(errors.items(), key=lambda item: item[1], reverse=True)
    shown = ranked[:_MAX_NAMES][::-1]  # matplotlib draws the first bar at the bottom
    figure, axes = new_figure(10.0, 1.2 + 0.24 * len(shown))
    axes.barh(
        [_shorten(name) for name, _ in shown],
        [error for _, error in shown],
        color=COLORS["quantized"],
    )
    axes.grid(axis="x", color=GRID)
    axes.grid(axis="y", visible=False)
    axes.margins(y=0.01)
    is_cut = len(shown) < len(ranked)
    suffix = f", the {len(shown)} largest of {len(ranked)}" if is_cut else ""
    axes.set_xlabel(_ERROR_LABEL + suffix)
    return figure


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a metric, for the rows that have it."""
    return [(row[GLOBAL_STEP], row[name]) for row in rows if row.get(name) is not None]


def _smooth(series: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Average steps and values over at most `_MAX_WINDOWS` consecutive windows of equal length."""
    length = ceil(len(series) / _MAX_WINDOWS)
    windows = [series[start : start + length] for start in range(0, len(series), length)]
    return [
        (sum(step for step, _ in w) / len(w), sum(value for _, value in w) / len(w))
        for w in windows
    ]


def _shorten(name: str, length: int = 60) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]
