"""Write a sweep's folder: results.csv, plots, and a self-contained index.html.

The files are written whenever a job ends, so a sweep that is killed leaves the results so far.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write
from hqqtrain.launch.sweep.plots import AXES, plot_cost
from hqqtrain.launch.sweep.results import (
    JobResults,
    TableRow,
    format_cells,
    format_csv,
    format_table,
    read_rows,
)
from hqqtrain.launch.sweep.sweep import Sweep
from hqqtrain.report.html import Link, render_page, render_plots, render_section, render_wide_table
from hqqtrain.report.run_report import LIVE_SECONDS
from hqqtrain.report.style import save_figure
from hqqtrain.rundir.layout import RunLayout


def create_sweep_folder(sweep: Sweep) -> None:
    """Create the folder of `sweep`.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        sweep.log_file(sweep.jobs[0]).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        root = sweep.jobs[0].config.run.root
        raise UserError(
            f"run.root={root}: cannot be written to ({error}); choose another folder."
        ) from error


def write_sweep_report(sweep: Sweep, results: JobResults | None = None) -> list[Path]:
    """Write the table and the plots from the jobs' results so far, and return the files."""
    rows = read_rows(sweep, results)
    csv_file = atomic_write(sweep.folder / "results.csv", format_csv(rows))
    figures = {name: plot_cost(rows, axis) for name, axis in AXES.items()}
    plots = {
        name: save_figure(figure, sweep.folder / f"{name}.svg")
        for name, figure in figures.items()
        if figure
    }
    page = atomic_write(sweep.folder / "index.html", _page(sweep, rows, plots))
    return [csv_file, page, *plots.values()]


def print_sweep_table(sweep: Sweep, results: JobResults | None = None) -> None:
    """Print the table to standard output, and write the files of the sweep again.

    Raises:
        UserError: the files cannot be written.
    """
    print("\n" + format_table(read_rows(sweep, results)) + "\n", flush=True)
    try:
        files = write_sweep_report(sweep, results)
    except OSError as error:
        raise UserError(
            f"{sweep.folder}: the table was not written ({error}); fix that, then write it by "
            "repeating the command of the sweep with --table as its first argument."
        ) from error
    print("\n".join(f"wrote {file}" for file in files), flush=True)


def _page(sweep: Sweep, rows: Sequence[TableRow], plots: dict[str, Path]) -> str:
    """Return the HTML page of the sweep: its plots, then its table."""
    counts = Counter(row.status for row in rows)
    subtitle = f"{len(rows)} jobs: " + ", ".join(f"{n} {status}" for status, n in counts.items())
    svgs = {f"Perplexity against {name}": path.read_text() for name, path in plots.items()}
    headings, cells = format_cells(rows)
    linked = [
        [*line[:-1], _report_link(sweep.folder, Path(row.folder))]
        for row, line in zip(rows, cells, strict=True)
    ]
    table = render_section("Results", render_wide_table([*headings[:-1], "report"], linked))
    is_live = counts["running"] or counts["unfinished"] or counts["pending"]
    refresh_seconds = LIVE_SECONDS if is_live else None
    body = [render_plots(svgs), table]
    return render_page(sweep.name, subtitle, body, refresh_seconds=refresh_seconds)


def _report_link(folder: Path, job_folder: Path) -> Link | str:
    """Return a link from the page in `folder` to the report of a job, if that exists."""
    layout = RunLayout(job_folder)
    for page in (layout.report_html, layout.data_html):
        if page.is_file():
            return Link(job_folder.name, os.path.relpath(page, folder))
    return job_folder.name
