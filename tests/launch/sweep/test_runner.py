"""Running the jobs of a sweep: failures, preemptions, what is skipped.

A shell script takes the place of launch.sh: the value of `data.source` says how its run ends.
"""

import re
import signal
from dataclasses import replace

import pytest
from sweeps import make_sweep, write_run_files

from hqqtrain.common.errors import DONE, FAILED, PREEMPTED, USER_ERROR
from hqqtrain.launch.sweep import runner
from hqqtrain.launch.sweep.results import JobResults
from hqqtrain.launch.sweep.runner import run_sweep

SCRIPT = """#!/bin/sh
echo "$*" >>"$STARTED"
echo "output of $1"
case "$1" in
  *looks*)
    for i in $(seq 100); do
      grep "${1#data.source=},.*running" "$TABLE" && exit 0
      sleep 0.1
    done
    exit 1 ;;
  *ok*) exit 0 ;; *wrong*) exit 2 ;; *preempted*) exit 3 ;; *killed*) kill -9 $$ ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Return the function that lists the arguments of all starts so far."""
    (tmp_path / "launch.sh").write_text(SCRIPT)
    (tmp_path / "launch.sh").chmod(0o755)
    monkeypatch.setenv(runner.LAUNCHER_VARIABLE, str(tmp_path / "launch.sh"))
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    (tmp_path / "started").touch()
    return lambda: (tmp_path / "started").read_text().splitlines()


def _exit_codes(sweep) -> list[int]:
    return [JobResults(sweep)._records[job.name]["exit_code"] for job in sweep.jobs]


def test_every_job_starts_once_with_its_own_and_the_shared_overrides(tmp_path, started):
    sweep = make_sweep(tmp_path / "runs", "ok1", "ok2")
    assert run_sweep(sweep.jobs) == DONE
    assert started() == [" ".join(job.arguments) for job in sweep.jobs]
    assert all(f"track.group={sweep.name}" in line for line in started())
    assert _exit_codes(sweep) == [0, 0]


def test_a_failed_job_is_named_and_does_not_end_the_sweep(tmp_path, started, capfd):
    sweep = make_sweep(tmp_path / "runs", "bad", "wrong", "killed", "ok")
    assert run_sweep(sweep.jobs) == FAILED
    assert len(started()) == 4
    assert _exit_codes(sweep) == [1, 2, -signal.SIGKILL, 0]
    shown, errors = capfd.readouterr()
    assert "sweep 1/4: data.source=bad: failed with exit code 1 (" in shown
    failed = re.findall(r"^hqqtrain: error: data.source=(\w+): failed; see ", errors, re.M)
    assert failed == ["bad", "wrong", "killed"]


def test_a_preempted_job_ends_the_sweep_with_its_code(tmp_path, started):
    sweep = make_sweep(tmp_path / "runs", "ok", "preempted", "never")
    assert run_sweep(sweep.jobs) == PREEMPTED
    assert len(started()) == 2
    assert (sweep.folder / "results.csv").is_file()


def test_a_job_that_is_done_is_not_started_again(tmp_path, started, monkeypatch, capfd):
    sweep = make_sweep(tmp_path / "runs", "a", "ok")
    monkeypatch.setattr(type(sweep.jobs[0]), "is_done", lambda job: job.name == "job0")
    write_run_files(sweep.jobs[0], "done", {"quantize": {"bits_per_weight": 2.5}})
    assert run_sweep(sweep.jobs) == DONE
    assert len(started()) == 1
    assert "data.source=a: done before: 2.50 bits per weight\n" in capfd.readouterr().out


def test_a_finished_job_whose_directory_is_damaged_fails_alone(tmp_path, started, capfd):
    sweep = make_sweep(tmp_path / "runs", "a", "ok")
    write_run_files(sweep.jobs[0], "done")
    (sweep.jobs[0].folder / "config.yaml").write_text("{")
    assert run_sweep(sweep.jobs) == FAILED
    assert len(started()) == 1
    assert _exit_codes(sweep) == [USER_ERROR, 0]
    assert "config.yaml: cannot be read" in capfd.readouterr().err


def test_a_running_job_is_running_in_the_table(tmp_path, started, monkeypatch):
    sweep = make_sweep(tmp_path / "runs", "ok", "looks", "looks2")
    monkeypatch.setenv("TABLE", str(sweep.folder / "results.csv"))
    assert run_sweep(sweep.jobs) == DONE
    assert len(started()) == 3


def test_a_duplicate_is_announced_and_skipped(tmp_path, started, capfd):
    sweep = make_sweep(tmp_path / "runs", "ok1", "ok2")
    assert run_sweep([*sweep.jobs, replace(sweep.jobs[0])]) == DONE
    assert len(started()) == 2
    assert ": skipped, because another job is the same run\n" in capfd.readouterr().out


def test_parallel_jobs_have_logs_with_their_command_and_output(tmp_path, started, capfd):
    sweep = make_sweep(tmp_path / "runs", "ok1", "bad", "ok2")
    for job in sweep.jobs:
        job.config.launch.max_parallel_jobs = 2
    assert run_sweep(sweep.jobs) == FAILED
    assert len(started()) == 3
    for job in sweep.jobs:
        command, output = sweep.log_file(job).read_text().splitlines()
        assert command == f"$ python -m hqqtrain {' '.join(job.arguments)}"
        assert output == f"output of {job.arguments[0]}"
    assert f"see {sweep.log_file(sweep.jobs[1])}\n" in capfd.readouterr().err


def test_a_table_that_cannot_be_written_has_exit_code_2_but_no_job_is_lost(
    tmp_path, started, capfd
):
    sweep = make_sweep(tmp_path / "runs", "ok1", "ok2")
    (sweep.folder / "results.csv").mkdir()
    assert run_sweep(sweep.jobs) == USER_ERROR
    assert len(started()) == 2
    assert "was not written" in capfd.readouterr().err


def test_a_job_killed_by_the_forwarded_signal_counts_as_preempted():
    assert runner._exit_codes_of_signal(signal.SIGTERM) == (-15, 143)
    assert runner._exit_codes_of_signal(signal.SIGINT) == (-2, 130, FAILED)
