"""The end of a run: the files of a success, and status.json of every failure."""

import errno
import json
import logging
from pathlib import Path

import pytest

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.tasks.finalize import finalize_failure, finalize_success
from hqqtrain.tasks.summary import RunSummary
from hqqtrain.tracking.composite import CompositeTracker
from hqqtrain.tracking.console import Console


class _SourceError(UserError):
    """A special case of a user's error."""


class _Tracker:
    """Notes the calls that the end of a run makes."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        def note(*arguments: object) -> None:
            self.calls.append((name, *arguments))

        return note


@pytest.fixture
def begun(make_config, tmp_path: Path):
    """Return the locked directory of a run that has begun."""
    with RunDirectory(make_config()) as directory:
        directory.begin(["hqqtrain"])
        yield directory


@pytest.fixture
def summary(make_config, start_run) -> RunSummary:
    with start_run(make_config(run={"name": "other"})) as run:
        return RunSummary(run.config, run.runtime)


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_success(begun: RunDirectory, summary: RunSummary, monkeypatch, capsys):
    plot = begun.layout.report / "loss.png"
    files = {"loss": plot.with_suffix(".svg"), "loss.png": plot, "index": begun.layout.report_html}
    reports = []

    def write_report(*arguments, **options):
        reports.append((*arguments, options))
        return files

    monkeypatch.setattr("hqqtrain.tasks.finalize.write_report", write_report)
    begun.layout.adapter.mkdir()
    tracker = _Tracker()
    finalize_success(begun, CompositeTracker([tracker]), Console(), summary, ["a sample"])
    ((folder, content, options),) = reports
    assert (folder, content) == (begun.path, summary.content.to_json())
    assert (options["status"].status, options["samples"]) == ("done", ["a sample"])
    assert options["images"]
    assert _read(begun.layout.summary_json) == summary.content.to_json()
    assert _read(begun.layout.status_json)["status"] == "done"
    assert tracker.calls == [
        ("log_summary", summary.content.to_json()), ("log_images", {"loss": plot}),
        ("log_artifact", begun.layout.adapter), ("hint",), ("finish", 0),
    ]  # fmt: skip
    assert f"wrote {begun.layout.summary_json}" in capsys.readouterr().out


def test_a_plot_that_cannot_be_drawn_does_not_fail_the_run(
    begun: RunDirectory, summary: RunSummary, monkeypatch, caplog
):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("hqqtrain.tasks.finalize.write_report", fail)
    with caplog.at_level(logging.WARNING):
        finalize_success(begun, CompositeTracker([]), Console(False), summary)
    assert "report/ was not written: RuntimeError('no font')" in caplog.text
    assert _read(begun.layout.status_json)["status"] == "done"


@pytest.mark.parametrize(("error", "status", "code"), [
    (UserError("bad"), "failed", 2), (_SourceError("bad"), "failed", 2),
    (PreemptedError("SIGTERM"), "preempted", 3), (ZeroDivisionError("x"), "failed", 1),
    (KeyboardInterrupt(), "failed", 1),
])  # fmt: skip
def test_a_failure(
    begun: RunDirectory, summary: RunSummary, error: BaseException, status: str, code: int,
    monkeypatch,
):  # fmt: skip
    reports = []
    monkeypatch.setattr(
        "hqqtrain.tasks.finalize.write_report",
        lambda *_, status, **__: reports.append(status) or {},
    )
    tracker = _Tracker()
    finalize_failure(begun, CompositeTracker([tracker]), error, summary)
    (reported,) = reports
    assert (reported.status, reported.exit_code) == (status, code)
    assert reported.cause == f"{type(error).__name__}: {error}"
    status_json = _read(begun.layout.status_json)
    assert (status_json["status"], status_json["exit_code"]) == (status, code)
    assert status_json["cause"] == f"{type(error).__name__}: {error}"
    assert tracker.calls == [("finish", code)]


def test_a_full_disk_does_not_replace_the_error(
    begun: RunDirectory, summary: RunSummary, monkeypatch, caplog
):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunDirectory, "write_status", fail)
    tracker = _Tracker()
    finalize_failure(begun, CompositeTracker([tracker]), UserError("bad"), summary)
    assert "status.json was not written" in caplog.text
    assert tracker.calls == [("finish", 2)]
