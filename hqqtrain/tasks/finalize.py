"""The last files and log lines of a run, whether it has finished or failed."""

import logging
from collections.abc import Mapping

from hqqtrain.common.errors import DONE, FAILED, PREEMPTED, USER_ERROR, PreemptedError, UserError
from hqqtrain.report.run_report import write_report
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.tasks.summary import RunSummary
from hqqtrain.tracking.composite import CompositeTracker
from hqqtrain.tracking.console import Console

logger = logging.getLogger(__name__)

_STATUS_OF_ERROR: dict[type, tuple[str, int]] = {
    UserError: ("failed", USER_ERROR),
    PreemptedError: ("preempted", PREEMPTED),
}
"""(status, exit code) of the errors that are not defects."""


def finalize_success(
    directory: RunDirectory,
    trackers: CompositeTracker,
    console: Console,
    summary: RunSummary,
    layer_errors: Mapping[str, float],
) -> None:
    """Finish a successful run: write summary.json, report/ and status.json, and print the table."""
    directory.write_summary(summary.figures.to_json())
    trackers.log_summary(summary.figures.to_json())
    _write_report(directory, trackers, summary, layer_errors)
    if directory.layout.adapter.exists():
        trackers.log_artifact(directory.layout.adapter)
    hints = trackers.hints()
    trackers.finish(DONE)
    directory.write_status("done", exit_code=DONE)
    console.print_results(summary.table_rows(), directory.layout.existing_results(), hints)


def finalize_failure(
    directory: RunDirectory, trackers: CompositeTracker, error: BaseException
) -> None:
    """Record the error that ended the run.

    status.json is written first: closing the trackers may take longer than a preempted process
    is given.
    """
    status, code = _STATUS_OF_ERROR.get(type(error), ("failed", FAILED))
    cause = f"{type(error).__name__}: {error}"
    try:
        directory.write_status(status, exit_code=code, cause=cause)
    except OSError as failure:  # such as a full disk; it must not replace the original error
        logger.error("status.json was not written: %s", failure)
    trackers.finish(code)


def _write_report(
    directory: RunDirectory,
    trackers: CompositeTracker,
    summary: RunSummary,
    layer_errors: Mapping[str, float],
) -> None:
    """Write report/; a plot that cannot be drawn does not fail a finished run."""
    layout = directory.layout
    try:
        files = write_report(
            layout.folder, layout.metrics_jsonl, summary.figures.to_json(), layer_errors
        )
        trackers.log_images({n: p for n, p in files.items() if p.suffix == ".png"})
    except Exception as error:
        logger.warning("report/ was not written: %r", error)
