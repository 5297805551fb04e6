"""The last files and log lines of a run, whether it has finished or failed."""

import logging
from collections.abc import Mapping

from hqqtrain.ckpt import RunDirectory
from hqqtrain.config import PreemptedError, UserError
from hqqtrain.config.codes import DONE, FAILED, PREEMPTED, USER_ERROR
from hqqtrain.tasks.summary import Summary
from hqqtrain.track import Console, Trackers, write_report

logger = logging.getLogger(__name__)

_RESULTS = (
    "quantized",
    "adapter",
    "export",
    "checkpoints",
    "summary.json",
    "metrics.jsonl",
    "report/index.html",
)
"""Results that the console lists at the end, if they exist."""
_STATUS_OF_ERROR: dict[type, tuple[str, int]] = {
    UserError: ("failed", USER_ERROR),
    PreemptedError: ("preempted", PREEMPTED),
}
"""(status, exit code) of the errors that are not defects."""


def end_well(
    directory: RunDirectory,
    trackers: Trackers,
    console: Console,
    summary: Summary,
    layer_errors: Mapping[str, float],
) -> None:
    """Finish a successful run: write summary.json, report/ and status.json, and print the table."""
    directory.write_summary(summary.parts)
    trackers.summary(summary.parts)
    _write_report(directory, trackers, summary, layer_errors)
    if (adapter := directory.path / "adapter").exists():
        trackers.artifact(adapter)
    hints = trackers.hints()
    trackers.finish(DONE)
    directory.write_status("done", exit_code=DONE)
    results = (directory.path / name for name in _RESULTS)
    console.results(summary.rows(), [path for path in results if path.exists()], hints)


def end_badly(directory: RunDirectory, trackers: Trackers, error: BaseException) -> None:
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
    directory: RunDirectory, trackers: Trackers, summary: Summary, layer_errors: Mapping[str, float]
) -> None:
    """Write report/; a plot that cannot be drawn does not fail a finished run."""
    folder = directory.path
    try:
        files = write_report(folder, folder / "metrics.jsonl", summary.parts, layer_errors)
        trackers.images({n: p for n, p in files.items() if p.suffix == ".png"})
    except Exception as error:
        logger.warning("report/ was not written: %r", error)
