"""Finish a run: write its last files and close its trackers, after success and after failure."""

import logging
from collections.abc import Sequence
from pathlib import Path

from hqqtrain.common.errors import DONE, FAILED, PREEMPTED, USER_ERROR, PreemptedError, UserError
from hqqtrain.common.secrets import mask_secrets
from hqqtrain.report.run_report import write_report
from hqqtrain.report.samples import Sample
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.rundir.schema import Status
from hqqtrain.tasks.hints import usage_hints
from hqqtrain.tasks.summary import RunSummary
from hqqtrain.tracking.composite import CompositeTracker
from hqqtrain.tracking.console import Console

logger = logging.getLogger(__name__)


def finalize_success(
    directory: RunDirectory,
    trackers: CompositeTracker,
    console: Console,
    summary: RunSummary,
    samples: Sequence[Sample] = (),
) -> None:
    """Finish a successful run: write summary.json, report/ and status.json, and print the table.

    Args:
        directory: The locked directory of the run.
        trackers: Get the summary, the plots and the adapter; closed here.
        console: Prints the table of results.
        summary: The complete summary.
        samples: Continuations of held-out text for the report.
    """
    content = summary.content.to_json()
    directory.write_summary(content)
    trackers.log_summary(content)
    training = summary.content.train
    stopped_early = training.stopped_early if training else None
    # The report of a packed export would show nothing.
    if not summary.is_packed_export and not summary.has_data_page:
        # status.json does not say it yet.
        status = Status("done", DONE, stopped_early)
        images = _write_report(directory, summary, status, samples, images=trackers.shows_images)
        trackers.log_images(images)
    if directory.layout.adapter.exists():
        trackers.log_artifact(directory.layout.adapter)
    hints = usage_hints(summary.content, directory.layout) + trackers.hints()
    trackers.finish(DONE)
    # The status comes last: until then, the same command resumes the run and finishes it again.
    directory.write_status("done", exit_code=DONE, cause=stopped_early or "")
    console.print_results(summary.table_rows(), directory.layout.existing_results(), hints)


def finalize_failure(
    directory: RunDirectory, trackers: CompositeTracker, error: BaseException, summary: RunSummary
) -> None:
    """Record the error that ended the run.

    status.json is written first, because a preempted process may be killed while it closes the
    trackers. The report comes last. It says how the run has ended, with the results so far.
    """
    status, exit_code = _status_and_exit_code(error)
    cause = f"{type(error).__name__}: {error}"
    try:
        directory.write_status(status, exit_code=exit_code, cause=cause)
    except OSError as write_error:  # such as a full disk; it must not replace the original error
        logger.error("status.json was not written: %s", write_error)
    trackers.finish(exit_code)
    if not summary.has_data_page:
        _write_report(directory, summary, Status(status, exit_code, mask_secrets(cause)))


def _status_and_exit_code(error: BaseException) -> tuple[str, int]:
    """Return the status and the exit code of a run that `error` has ended."""
    if isinstance(error, PreemptedError):
        return "preempted", PREEMPTED
    return "failed", USER_ERROR if isinstance(error, UserError) else FAILED


def _write_report(
    directory: RunDirectory,
    summary: RunSummary,
    status: Status,
    samples: Sequence[Sample] = (),
    *,
    images: bool = False,
) -> dict[str, Path]:
    """Write report/ and return its images by the names of the plots, if there are any.

    Errors are only logged: a plot that cannot be drawn must not fail the run.
    """
    try:
        files = write_report(
            directory.path, summary.content.to_json(), status=status, samples=samples, images=images
        )
    except Exception as error:
        logger.warning("report/ was not written: %r", error)
        return {}
    return {file.stem: file for file in files.values() if file.suffix == ".png"}
