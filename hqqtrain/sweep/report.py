"""Writes a sweep's folder: results.csv, plots, and a self-contained index.html.

The files are written whenever a job ends, so that a killed sweep leaves the results it has.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hqqtrain.config import UserError
from hqqtrain.config.atomic import atomic_write
from hqqtrain.sweep.outcomes import Outcomes
from hqqtrain.sweep.plots import AXES, cost_figure
from hqqtrain.sweep.sweep import Sweep
from hqqtrain.sweep.table import Row, cells, csv_text, rows_of, text_table
from hqqtrain.track import document, images, save_figure, table


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


def write_files(sweep: Sweep, outcomes: Outcomes | None = None) -> list[Path]:
    """Write the table and the plots from the jobs' results so far, and return the files."""
    rows = rows_of(sweep, outcomes)
    results = atomic_write(sweep.folder / "results.csv", csv_text(rows))
    figures = {name: cost_figure(rows, axis) for name, axis in AXES.items()}
    plots = {
        name: save_figure(figure, sweep.folder / f"{name}.png")
        for name, figure in figures.items()
        if figure
    }
    page = atomic_write(sweep.folder / "index.html", _page(sweep, rows, plots))
    return [results, page, *plots.values()]


def print_table(sweep: Sweep, outcomes: Outcomes | None = None) -> None:
    """Print the table to standard output, and write the files of the sweep again.

    Raises:
        UserError: the files cannot be written.
    """
    print("\n" + text_table(rows_of(sweep, outcomes)) + "\n", flush=True)
    try:
        files = write_files(sweep, outcomes)
    except OSError as error:
        raise UserError(
            f"{sweep.folder}: the table was not written ({error}); fix that, then write it by "
            "repeating the command of the sweep with --table as its first argument."
        ) from error
    print("\n".join(f"wrote {file}" for file in files), flush=True)


def _page(sweep: Sweep, rows: Sequence[Row], plots: dict[str, Path]) -> str:
    states = Counter(row.status for row in rows)
    subtitle = f"{len(rows)} jobs: " + ", ".join(f"{n} {state}" for state, n in states.items())
    titled = {f"Perplexity against {AXES[name].label}": path for name, path in plots.items()}
    results = f'<section class="wide"><h2>Results</h2>{table(*cells(rows))}</section>'
    return document(sweep.name, subtitle, [images(titled), results])
