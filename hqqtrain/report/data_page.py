"""The page of task=data, `report/data.html`: the same as on the console, to be mailed or kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hqqtrain.common.files import atomic_write, make_folder
from hqqtrain.report.data_view import PLAIN_TEXT, DataSample, DataView, Piece, percent
from hqqtrain.report.html import (
    render_page,
    render_plots,
    render_section,
    render_table,
    render_tiles,
)
from hqqtrain.report.style import COLORS, GRID, WIDE, new_figure, render_svg
from hqqtrain.report.text import escape_controls, escape_html
from hqqtrain.rundir.layout import RunLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NEWLINE_SIGN = "<i>\u21b5</i>\n"
"""A trained line ending, which would have no color of its own."""


def write_data_page(run_dir: Path, view: DataView, title: str) -> Path:
    """Write the page of `view` below `run_dir`, and return its path."""
    layout = RunLayout(run_dir)
    make_folder(layout.report)
    return atomic_write(layout.data_html, render_data_page(view, title))


def render_data_page(view: DataView, title: str) -> str:
    """Return the page of `view`; `title` is the name of the run."""
    data, figures = view.metrics, view.figures()
    tiles = {
        "examples": f"{data.examples:,}",
        "tokens": f"{data.tokens:,}",
        "of the tokens trained": percent((data.trained_tokens or 0) / (data.tokens or 1)),
        "sequences": f"{data.sequences:,}",
    }
    plot = render_svg(plot_lengths(view.bars()), "lengths")
    body = [
        render_tiles(tiles),
        render_plots({"Examples by their number of tokens": plot}),
        render_section("Figures", render_table(("", ""), list(figures.items()))),
        _render_samples(view),
    ]
    return render_page(title, f"task data · {data.source}", body)


def plot_lengths(bars: Sequence[tuple[str, int]]) -> "Figure":
    """Plot one horizontal bar for each range of lengths (label, number of examples)."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axes = new_figure((WIDE[0], max(1.6, 0.8 + 0.22 * len(bars))))
    axes.barh(range(len(bars)), [number for _, number in bars], color=COLORS["trained"])
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()  # the shortest examples are on top
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set(xlabel="examples", ylabel="tokens")
    return figure


def _render_samples(view: DataView) -> str:
    """Return a section with all samples; empty without samples."""
    if not view.samples:
        return ""
    legend = (
        f"<p>{PLAIN_TEXT} <b>Bold</b> tokens are special tokens.</p>"
        if view.is_plain_text
        else "<p><mark>Marked</mark> tokens are trained, <b>bold</b> ones are special tokens, and "
        f"{_NEWLINE_SIGN.strip()} is a trained line ending.</p>"
    )
    samples = "".join(_render_sample(sample, not view.is_plain_text) for sample in view.samples)
    return render_section("Examples as the model gets them", legend + samples)


def _render_sample(sample: DataSample, marks: bool) -> str:
    html = "".join(_render_piece(piece, marks) for piece in sample.pieces)
    html = f"<h3>{escape_html(escape_controls(sample.title))}</h3>{_pre(html)}"
    if sample.hidden_tokens:
        rest = "".join(_render_piece(piece, marks) for piece in sample.last_pieces)
        html += f"<p>{escape_html(sample.hidden_note)}</p>{_pre(rest)}"
    return html


def _pre(html: str) -> str:
    return f"<pre>\n{html}</pre>"  # a browser drops a line ending at the beginning


def _render_piece(piece: Piece, marks: bool) -> str:
    html = escape_html(escape_controls(piece.text))
    if piece.is_special:
        html = f"<b>{html}</b>"
    if marks and piece.is_trained:
        html = f"<mark>{html.replace(chr(10), _NEWLINE_SIGN)}</mark>"
    return html
