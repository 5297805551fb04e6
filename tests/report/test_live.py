"""The report of a run that is not over: another process writes it, and it ends with the run."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from hqqtrain.report import live
from hqqtrain.report.live import LiveReport
from hqqtrain.rundir.layout import RunLayout


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(live, "FIRST_SECONDS", 0.0)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fake_report(monkeypatch, code: str) -> None:
    """Let the process run `code` in place of the report."""
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, "-c", code, command[-1]], **options)

    monkeypatch.setattr(live.subprocess, "Popen", start)


@pytest.mark.usefixtures("fast")
def test_the_report_is_written_while_the_run_goes_on(tmp_path):
    layout = RunLayout(tmp_path)
    layout.metrics_jsonl.write_text('{"train/global_step": 1, "train/loss": 2.5}\n')
    layout.status_json.write_text('{"status": "running"}')
    report = LiveReport(tmp_path, lambda: {"run": {"name": "mine"}, "eval": {"kl": float("nan")}})
    report.start()
    wait_for(layout.report_html.exists)
    report.stop()
    page = layout.report_html.read_text()
    assert "running · step 1" in page
    assert "<h1>mine</h1>" in page


@pytest.mark.usefixtures("fast")
def test_it_is_written_again_and_again_with_low_priority(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "LIVE_SECONDS", 0.0)
    fake_report(
        monkeypatch, "import sys; open(sys.argv[1] + '/calls', 'a').write(sys.stdin.read())"
    )
    numbers = iter(range(100_000))
    report = LiveReport(tmp_path, lambda: {"n": next(numbers)})
    report.start()
    wait_for(lambda: '{"n": 2}' in _read(tmp_path / "calls"))
    report.stop()
    assert _read(tmp_path / "calls").startswith('{"n": 0}{"n": 1}{"n": 2}')


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.usefixtures("fast")
def test_stop_ends_the_process_at_once_so_that_it_cannot_replace_the_last_report(
    tmp_path, monkeypatch
):
    fake_report(monkeypatch, "import sys, time; open(sys.argv[1] + '/on', 'w'); time.sleep(600)")
    report = LiveReport(tmp_path, dict)
    report.start()
    wait_for((tmp_path / "on").exists)
    started = time.monotonic()
    report.stop()
    assert time.monotonic() - started < 5
    assert not [c for c in psutil.Process().children() if "600" in " ".join(c.cmdline())]
    assert "live report" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.usefixtures("fast")
def test_a_report_that_fails_is_a_single_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(live, "LIVE_SECONDS", 0.0)
    fake_report(monkeypatch, "raise OSError('no space left')")
    report = LiveReport(tmp_path, dict)
    report.start()
    wait_for(lambda: not any(t.name == "live report" for t in threading.enumerate()))
    report.stop()
    (record,) = caplog.records
    assert record.getMessage() == ("report/ is not written during the run: OSError: no space left")


def test_a_run_that_ends_before_the_first_report_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(live.subprocess, "Popen", None)
    report = LiveReport(tmp_path, dict)
    report.start()
    report.stop()
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"
