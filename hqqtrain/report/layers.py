"""The plot of the quantization errors: a heat map of decoder layers and kinds of linear layers."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hqqtrain.report.style import COLORS, GRID, MUTED, new_figure, plot_label, scale_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ERROR_LABEL = "||W - W'||² / ||W||²"

_MAX_KINDS = 24
"""Largest number of kinds whose names are readable beside a heat map."""

_MAX_NAMES = 24
"""Largest number of modules that are readable in a plot of bars."""

_LABEL_LENGTH = 30
"""Characters of the name of a kind or a module; longer names are cut at the beginning."""

Kinds = dict[str, dict[int, float]]
"""Kind of module, such as `mlp.up_proj` -> decoder layer -> relative error."""


def plot_layer_errors(errors: Mapping[str, float]) -> "Figure | None":
    """Plot the relative error of every linear layer; None if there are no errors.

    The plot is a heat map with a row per kind of module, such as `mlp.up_proj`, and a column per
    decoder layer. If there are too many kinds, as with experts, their numbers are left out and
    their errors averaged. A model without numbered layers gets a bar per module instead, largest
    error first.
    """
    if not errors:
        return None
    kinds = group_by_kind(errors)
    if len(kinds) > _MAX_KINDS:
        kinds = _average_numbered(kinds)
    repeated_kinds = sum(len(layers) > 1 for layers in kinds.values())
    if len(kinds) <= _MAX_KINDS and repeated_kinds > len(kinds) / 2:
        return _plot_heat_map(kinds)
    return _plot_bars(errors)


def group_by_kind(errors: Mapping[str, float]) -> Kinds:
    """Group errors by kind of module, then by decoder layer.

    `model.layers.3.mlp.up_proj` becomes {"mlp.up_proj": {3: error}}. A name without a number
    belongs to layer 0. If the model has several stacks of layers, such as an encoder and a decoder,
    the kinds contain the names of the stacks.
    """
    matches = {name: re.search(r"(?:^|\.)(\d+)\.", name) for name in errors}
    stacks = {name[: match.start()] for name, match in matches.items() if match}
    has_stacks = len(stacks) > 1
    kinds: Kinds = {}
    for name, error in errors.items():
        kind, layer = name, 0
        if match := matches[name]:
            kind, layer = name[match.end() :], int(match.group(1))
            if has_stacks:
                kind = f"{name[: match.start()]}.*.{kind}"
        kinds.setdefault(kind, {})[layer] = error
    return kinds


def _average_numbered(kinds: Kinds) -> Kinds:
    """Return the mean errors of the kinds that differ in numbers only, such as experts."""
    groups: dict[str, dict[int, list[float]]] = {}
    for kind, layers in kinds.items():
        group = groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", kind), {})
        for layer, error in layers.items():
            group.setdefault(layer, []).append(error)
    return {
        kind: {layer: sum(errors) / len(errors) for layer, errors in layers.items()}
        for kind, layers in groups.items()
    }


def _plot_heat_map(kinds: Kinds) -> "Figure":
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    layers = range(1 + max(max(errors) for errors in kinds.values()))
    cells = [[errors.get(layer, math.nan) for layer in layers] for errors in kinds.values()]
    values = [error for errors in kinds.values() for error in errors.values()]
    low, high = min(values), max(values)
    is_log = 0 < 10 * low < high
    figure, axes = new_figure((4.6, max(3.3, 1.0 + 0.2 * len(kinds))))
    # Without interpolation, the SVG has one pixel per cell, which the browser scales.
    norm = LogNorm(low, high) if is_log else Normalize(low, high)
    image = axes.imshow(cells, aspect="auto", interpolation="none", cmap="viridis", norm=norm)
    labels = [plot_label(kind, _LABEL_LENGTH) for kind in kinds]
    axes.set_yticks(range(len(kinds)), labels, parse_math=False)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0, labelsize=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("decoder layer")
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=9.5, length=0)
    bar.set_label(_ERROR_LABEL, color=MUTED, fontsize=10)
    if not is_log:
        bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    return figure


def _plot_bars(errors: Mapping[str, float]) -> "Figure":
    """Plot one horizontal bar per module, for the modules with the largest errors."""
    ranked = sorted(errors.items(), key=lambda item: item[1], reverse=True)
    shown = ranked[:_MAX_NAMES][::-1]  # matplotlib draws the first bar at the bottom
    figure, axes = new_figure((4.6, max(1.6, 1.0 + 0.2 * len(shown))))
    axes.barh(range(len(shown)), [error for _, error in shown], color=COLORS["quantized"])
    labels = [plot_label(name, _LABEL_LENGTH) for name, _ in shown]
    axes.set_yticks(range(len(shown)), labels, parse_math=False)
    axes.tick_params(axis="y", labelsize=9.5, length=0)
    axes.grid(axis="x", color=GRID)
    axes.grid(axis="y", visible=False)
    axes.margins(y=0.01)
    axes.locator_params(axis="x", nbins=4)
    scale_axis(axes, "x", ())
    is_cut = len(shown) < len(ranked)
    suffix = f",\nthe {len(shown)} largest of {len(ranked)}" if is_cut else ""
    axes.set_xlabel(_ERROR_LABEL + suffix)
    return figure
