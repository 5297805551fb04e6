"""Writes a sweep's folder: results.csv, plots, and a self-contained index.html.

The files are written whenever a job ends, so that a killed sweep leaves the results it has.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write
from hqqtrain.launch.sweep.plots import AXES, cost_figure
from hqqtrain.launch.sweep.results import (
    JobResults,
    TableRow,
    csv_text,
    table_cells,
    table_rows,
    text_table,
)
from hqqtrain.launch.sweep.sweep import Sweep
from hqqtrain.report.html import html_document, html_images, html_table
from hqqtrain.report.style import save_figure


def make_folder(sweep: Sweep) -> None:
    """Create the folder of `sweep`.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        sweep.log(sweep.jobs[0]).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        root = sweep.jobs[0].config.run.root
        raise UserError(
            f"run.root={root}: cannot be written to ({error}); choose another folder."
        ) from error


def write_files(sweep: Sweep, outcomes: JobResults | None = None) -> list[Path]:
    """Write the table and the plots from the jobs' results so far, and return the files."""
    rows = table_rows(sweep, outcomes)
    results = atomic_write(sweep.folder / "results.csv", csv_text(rows))
    figures = {name: cost_figure(rows, axis) for name, axis in AXES.items()}
    plots = {
        name: save_figure(figure, sweep.folder / f"{name}.png")
        for name, figure in figures.items()
        if figure
    }
    page = atomic_write(sweep.folder / "index.html", _page(sweep, rows, plots))
    return [results, page, *plots.values()]


def print_table(sweep: Sweep, outcomes: JobResults | None = None) -> None:
    """Print the table to standard output, and write the files of the sweep again.

    Raises:
        UserError: the files cannot be written.
    """
    print("\n" + text_table(table_rows(sweep, outcomes)) + "\n", flush=True)
    try:
        files = write_files(sweep, outcomes)
    except OSError as error:
        raise UserError(
            f"{sweep.folder}: the table was not written ({error}); fix that, then write it by "
            "repeating the command of the sweep with --table as its first argument."
        ) from error
    print("\n".join(f"wrote {file}" for file in files), flush=True)


def _page(sweep: Sweep, rows: Sequence[TableRow], plots: dict[str, Path]) -> str:
    states = Counter(row.status for row in rows)
    subtitle = f"{len(rows)} jobs: " + ", ".join(f"{n} {state}" for state, n in states.items())
    titled = {f"Perplexity against {AXES[name].label}": path for name, path in plots.items()}
    results = f'<section class="wide"><h2>Results</h2>{html_table(*table_cells(rows))}</section>'
    return html_document(sweep.name, subtitle, [html_images(titled), results])
