"""The last files and words of a run, of one that is done and of one that is not."""

import logging
from typing import TYPE_CHECKING

from hqqtrain.config import PreemptedError, UserError
from hqqtrain.track import write_report

if TYPE_CHECKING:
    from hqqtrain.tasks.record import Record

logger = logging.getLogger(__name__)

_RESULTS = (
    "quantized", "adapter", "export", "checkpoints", "summary.json", "metrics.jsonl",
    "report/index.html",
)  # fmt: skip
_ENDS: dict[type, tuple[str, int]] = {UserError: ("failed", 2), PreemptedError: ("preempted", 3)}


def end_well(record: "Record") -> None:
    """The run is done: summary.json, report/, trackers, status.json, and the table."""
    parts = record.summary.parts
    record.directory.write_summary(parts)
    record.trackers.summary(parts)
    _report(record)
    if (adapter := record.path("adapter")).exists():
        record.trackers.artifact(adapter)
    hints = record.trackers.hints()
    record.trackers.finish(0)
    record.directory.write_status("done", exit_code=0)
    written = [record.path(name) for name in _RESULTS if record.path(name).exists()]
    record.console.results(record.summary.rows(), written, hints)


def end_badly(record: "Record", error: BaseException) -> None:
    """What ended the run. status.json comes first: trackers may take longer than there is time."""
    status, code = _ENDS.get(type(error), ("failed", 1))
    cause = f"{type(error).__name__}: {error}"
    try:
        record.directory.write_status(status, exit_code=code, cause=cause)
    except OSError as fault:  # of a full disk, too; what ended the run is what counts
        logger.error("status.json was not written: %s", fault)
    record.trackers.finish(code)


def _report(record: "Record") -> None:
    """Draws report/; a plot that fails is no reason to call a finished run failed."""
    folder, metrics = record.directory.path, record.path("metrics.jsonl")
    try:
        files = write_report(folder, metrics, record.summary.parts, record.layer_errors)
        record.trackers.images({n: p for n, p in files.items() if p.suffix == ".png"})
    except Exception as error:
        logger.warning("report/ was not written: %r", error)
