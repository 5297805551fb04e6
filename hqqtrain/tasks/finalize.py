"""The last files and words of a run, of one that is done and of one that is not."""

import logging
from collections.abc import Mapping

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.common.exit_codes import DONE, FAILED, PREEMPTED, USER_ERROR
from hqqtrain.report.run_report import write_report
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.tasks.summary import RunSummary
from hqqtrain.tracking.composite import CompositeTracker
from hqqtrain.tracking.console import Console

logger = logging.getLogger(__name__)

_RESULTS = (
    "quantized", "adapter", "export", "checkpoints", "summary.json", "metrics.jsonl",
    "report/index.html",
)  # fmt: skip

_ENDS: dict[type, tuple[str, int]] = {
    UserError: ("failed", USER_ERROR),
    PreemptedError: ("preempted", PREEMPTED),
}


def finalize_success(
    directory: RunDirectory, trackers: CompositeTracker, console: Console, summary: RunSummary,
    layer_errors: Mapping[str, float],
) -> None:  # fmt: skip
    """The run is done: summary.json, report/, trackers, status.json, and the table."""
    directory.write_summary(summary.parts)
    trackers.summary(summary.parts)
    _report(directory, trackers, summary, layer_errors)
    if (adapter := directory.path / "adapter").exists():
        trackers.artifact(adapter)
    hints = trackers.hints()
    trackers.finish(DONE)
    directory.write_status("done", exit_code=DONE)
    places = (directory.path / name for name in _RESULTS)
    console.results(summary.rows(), [path for path in places if path.exists()], hints)


def finalize_failure(
    directory: RunDirectory, trackers: CompositeTracker, error: BaseException
) -> None:
    """What ended the run. status.json comes first: trackers may take longer than there is time."""
    status, code = _ENDS.get(type(error), ("failed", FAILED))
    cause = f"{type(error).__name__}: {error}"
    try:
        directory.write_status(status, exit_code=code, cause=cause)
    except OSError as fault:  # of a full disk, too; what ended the run is what counts
        logger.error("status.json was not written: %s", fault)
    trackers.finish(code)


def _report(
    directory: RunDirectory,
    trackers: CompositeTracker,
    summary: RunSummary,
    layer_errors: Mapping[str, float],
) -> None:
    """Draws report/; a plot that fails is no reason to call a finished run failed."""
    folder = directory.path
    try:
        files = write_report(folder, folder / "metrics.jsonl", summary.parts, layer_errors)
        trackers.images({n: p for n, p in files.items() if p.suffix == ".png"})
    except Exception as error:
        logger.warning("report/ was not written: %r", error)
