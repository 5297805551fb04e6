"""A row for every job whatever its state, and files that a program and a browser can read."""

import os

import pytest
from sweeps import SUMMARY, make_sweep, write_run_files

from hqqtrain.compose.job import Job
from hqqtrain.launch.slurm.requeue import begin_attempt, end_attempt
from hqqtrain.launch.sweep.lock import hold_lock
from hqqtrain.launch.sweep.results import (
    JobResults,
    format_csv,
    format_table,
    read_rows,
    summary_metrics,
)
from hqqtrain.rundir.schema import Summary, TrainMetrics


def test_every_figure_has_its_column():
    assert summary_metrics(Summary.from_json(SUMMARY)) == {
        "bits_per_weight": 2.5, "relative_error": 0.1, "perplexity_full_precision": 8.0,
        "perplexity_quantized": 1234.5, "perplexity_final": None, "kl_quantized": 0.6,
        "kl_final": 0.25, "quantize_seconds": 0.5, "train_seconds": 60.0, "peak_memory_gib": 2.0,
        "tokens_per_second": 1200.4,
    }  # fmt: skip
    assert set(summary_metrics(Summary()).values()) == {None}
    assert (
        summary_metrics(Summary(train=TrainMetrics(seconds=float("nan"))))["train_seconds"] is None
    )


def test_a_sweep_of_data_has_the_columns_of_data(tmp_path):
    sweep = make_sweep(tmp_path, *"abc")
    data = {"examples": 4, "trained_tokens": 1234, "sequences": 2, "padding": 0.5, "truncated": 1}
    write_run_files(sweep.jobs[0], "done", {"data": data})
    write_run_files(sweep.jobs[1], "failed")
    rows = read_rows(sweep)
    header, first, *_ = format_csv(rows).splitlines()
    names = "examples,trained_tokens,sequences,padding,truncated,split,status,folder"
    assert header.endswith(f",{names}")
    assert first.startswith("a,4,1234,2,0.5,1,,done,")
    assert "perplexity" not in format_table(rows)
    assert "50.0%" in format_table(rows)
    write_run_files(sweep.jobs[2], "done", SUMMARY)
    for name in ("perplexity", "sequences"):
        assert name in format_table(read_rows(sweep))


def test_the_newest_record_decides_the_state_of_a_job(tmp_path):
    sweep = make_sweep(tmp_path, *"abcdef")
    new, killed, done, failed, preempted, later = sweep.jobs
    write_run_files(killed, "running")
    write_run_files(done, "done", SUMMARY)
    results = JobResults(sweep)
    results.record(failed, 2)
    results.record(preempted, 3)
    results.record(later, 1)
    results.save()
    write_run_files(later, "done", SUMMARY)  # run by hand, after the sweep
    os.utime(later.folder / "status.json", (2e9, 2e9))
    assert [row.status for row in read_rows(sweep)] == [
        "pending", "unfinished", "done", "failed", "preempted", "done",
    ]  # fmt: skip
    assert read_rows(sweep)[2].metrics["bits_per_weight"] == 2.5
    results.record(done, 2)
    results.save()  # as for a job whose inputs have changed since
    assert read_rows(sweep)[2].status == "failed"
    assert read_rows(sweep)[2].metrics["bits_per_weight"] is None
    assert new.folder.exists() is False


def test_a_started_job_is_running_while_the_sweep_or_a_job_lives(tmp_path):
    sweep = make_sweep(tmp_path, *"abcd")
    started, loaded, done, waiting = sweep.jobs
    write_run_files(loaded, "running")
    results = JobResults(sweep)
    for job in (started, loaded, done):
        results.record(job, None)
    results.save()
    write_run_files(done, "done", SUMMARY)
    os.utime(done.folder / "status.json", (2e9, 2e9))
    with hold_lock(sweep, lambda: None):
        states = [row.status for row in read_rows(sweep)]
    assert states == ["running", "running", "done", "pending"]
    # Now all processes are gone.
    assert [row.status for row in read_rows(sweep)] == [
        "unfinished",
        "unfinished",
        "done",
        "pending",
    ]
    results.forget_start(started)  # by the next attempt, which will start it later
    results.record(done, 1)
    results.forget_start(done)
    with hold_lock(sweep, lambda: None):
        assert [results.state(job) for job in (started, waiting)] == ["pending", "pending"]
    assert results._records[done.name]["exit_code"] == 1


def record_in_batch_job(job: Job, code: int | None) -> None:
    """Record the start and the end of a run, as the Slurm batch file does."""
    begin_attempt(job.folder, "7")
    if code is not None:
        end_attempt(job.folder, code, "7")


def test_records_of_a_batch_file_count_too(tmp_path):
    sweep = make_sweep(tmp_path, *"abcdefg")
    failed, stopped, started, done, early, again, gone = sweep.jobs
    record_in_batch_job(failed, 2)
    record_in_batch_job(stopped, 3)
    record_in_batch_job(started, None)
    write_run_files(done, "done", SUMMARY)
    record_in_batch_job(done, 0)
    write_run_files(early, "done", SUMMARY)
    record_in_batch_job(early, None)  # this start will find that the run is done
    record_in_batch_job(again, 2)
    write_run_files(again, "running")
    os.utime(again.folder / "status.json", (2e9, 2e9))
    record_in_batch_job(gone, 0)
    assert [row.status for row in read_rows(sweep)] == [
        "failed", "preempted", "unfinished", "done", "done", "unfinished", "pending",
    ]  # fmt: skip


def test_a_job_is_done_only_if_its_own_status_says_so(tmp_path):
    sweep = make_sweep(tmp_path, "a", "b", "c")
    results = JobResults(sweep)
    for job in sweep.jobs:
        results.record(job, 0)
    write_run_files(sweep.jobs[1], "running")
    write_run_files(sweep.jobs[2], "done")
    results.save()
    os.utime(sweep.jobs[1].folder / "status.json", (1e9, 1e9))
    assert [row.status for row in read_rows(sweep)] == ["pending", "unfinished", "done"]


@pytest.mark.parametrize(
    "broken", ["[]", "1", "{}", '{"exit_code": 1}', '{"exit_code": "1", "time": 1e12}', "null"]
)
def test_an_invalid_record_is_ignored(tmp_path, broken):
    sweep = make_sweep(tmp_path, "a", "b")
    (sweep.folder / "jobs.json").write_text(f'{{"job0": {broken}}}')
    write_run_files(sweep.jobs[1], ["done"])
    assert [row.status for row in read_rows(sweep)] == ["pending", "pending"]


def test_the_printed_table_is_rounded(tmp_path):
    sweep = make_sweep(tmp_path, "a", "b")
    write_run_files(sweep.jobs[0], "done", SUMMARY)
    good = format_table(read_rows(sweep)).splitlines()[-2].split()
    assert good == [
        "a", "2.50", "0.1000", "8.000", "1,234.500", "-", "0.6000", "0.2500", "0.5", "60.0",
        "2.000", "1,200", "done", "job0",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"quantize": {}}'])
def test_an_unreadable_summary_gives_no_figures(tmp_path, broken):
    sweep = make_sweep(tmp_path, "a", "b")
    write_run_files(sweep.jobs[0], "done")
    (sweep.jobs[0].folder / "summary.json").write_text(broken)
    assert set(read_rows(sweep)[0].metrics.values()) == {None}
