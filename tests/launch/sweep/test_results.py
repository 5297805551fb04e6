"""A row for every job whatever its state, and files that a program and a browser can read."""

import csv
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.compose.job import Job
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.launch.slurm.requeue import begin_attempt, end_attempt
from hqqtrain.launch.sweep.report import create_sweep_folder, write_sweep_report
from hqqtrain.launch.sweep.results import (
    COLUMNS,
    JobResults,
    collect_rows,
    format_table,
    summary_figures,
)
from hqqtrain.launch.sweep.runner import show_sweep_table
from hqqtrain.launch.sweep.sweep import Sweep
from hqqtrain.rundir.schema import Summary, TrainFigures

SUMMARY = {
    "quantize": {"bits_per_weight": 2.5, "relative_error": 0.1, "seconds": 0.5,
                 "peak_memory_gib": 1.0},
    "eval": {"full_precision": {"perplexity": 8.0}, "quantized": {"perplexity": 1234.5, "kl": 0.6},
             "final": {"perplexity": None, "kl": 0.25}},
    "train": {"seconds": 60.0, "peak_memory_gib": 2.0, "tokens_per_second": 1200.4},
}  # fmt: skip
HOSTILE = "<script>alert('$x_1$')</script>,\"&\n"


def sweep_of(root: Path, *values: str) -> Sweep:
    planned = []
    for number, value in enumerate(values):
        config = RunConfig(run=RunDirConfig(root=str(root), name=f"job{number}"))
        config.train.seed = number
        planned.append(Job([f"data.source={value}", f"run.root={root}"], config))
    sweep = Sweep.from_jobs(planned)
    create_sweep_folder(sweep)
    return sweep


def leave(job: Job, status: object, summary: dict | None = None) -> None:
    """Write the files that a run of `job` leaves behind."""
    job.folder.mkdir(exist_ok=True)
    (job.folder / "status.json").write_text(json.dumps({"status": status}))
    if summary is not None:
        (job.folder / "summary.json").write_text(json.dumps(summary))


def read_csv(sweep: Sweep) -> list[dict[str, str]]:
    with (sweep.folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_has_its_column():
    assert summary_figures(Summary.from_json(SUMMARY)) == {
        "bits_per_weight": 2.5, "relative_error": 0.1, "perplexity_full_precision": 8.0,
        "perplexity_quantized": 1234.5, "perplexity_final": None, "kl_quantized": 0.6,
        "kl_final": 0.25, "quantize_seconds": 0.5, "train_seconds": 60.0, "peak_memory_gib": 2.0,
        "tokens_per_second": 1200.4,
    }  # fmt: skip
    assert set(summary_figures(Summary()).values()) == {None}
    assert (
        summary_figures(Summary(train=TrainFigures(seconds=float("nan"))))["train_seconds"] is None
    )


def test_the_newest_record_decides_the_state_of_a_job(tmp_path):
    sweep = sweep_of(tmp_path, *"abcdef")
    new, killed, done, failed, preempted, later = sweep.jobs
    leave(killed, "running")
    leave(done, "done", SUMMARY)
    outcomes = JobResults(sweep)
    outcomes.record(failed, 2)
    outcomes.record(preempted, 3)
    outcomes.record(later, 1)
    outcomes.save()
    leave(later, "done", SUMMARY)  # run by hand, after the sweep
    os.utime(later.folder / "status.json", (2e9, 2e9))
    assert [row.status for row in collect_rows(sweep)] == [
        "pending", "unfinished", "done", "failed", "preempted", "done",
    ]  # fmt: skip
    assert collect_rows(sweep)[2].figures["bits_per_weight"] == 2.5
    outcomes.record(done, 2)
    outcomes.save()  # as for a job whose inputs have changed since
    assert collect_rows(sweep)[2].status == "failed"
    assert collect_rows(sweep)[2].figures["bits_per_weight"] is None
    assert new.folder.exists() is False


def record_in_batch_job(job: Job, code: int | None) -> None:
    """Record the start and the end of a run, as the Slurm batch file does."""
    begin_attempt(job.folder, "7")
    if code is not None:
        end_attempt(job.folder, code, "7")


def test_records_of_a_batch_file_count_too(tmp_path):
    sweep = sweep_of(tmp_path, *"abcdefg")
    failed, stopped, started, done, early, again, gone = sweep.jobs
    record_in_batch_job(failed, 2)
    record_in_batch_job(stopped, 3)
    record_in_batch_job(started, None)
    leave(done, "done", SUMMARY)
    record_in_batch_job(done, 0)
    leave(early, "done", SUMMARY)
    record_in_batch_job(early, None)  # this start will find that the run is done
    record_in_batch_job(again, 2)
    leave(again, "running")
    os.utime(again.folder / "status.json", (2e9, 2e9))
    record_in_batch_job(gone, 0)
    assert [row.status for row in collect_rows(sweep)] == [
        "failed", "preempted", "unfinished", "done", "done", "unfinished", "pending",
    ]  # fmt: skip


def test_a_job_is_done_only_if_its_own_status_says_so(tmp_path):
    sweep = sweep_of(tmp_path, "a", "b", "c")
    outcomes = JobResults(sweep)
    for job in sweep.jobs:
        outcomes.record(job, 0)
    leave(sweep.jobs[1], "running")
    leave(sweep.jobs[2], "done")
    outcomes.save()
    os.utime(sweep.jobs[1].folder / "status.json", (1e9, 1e9))
    assert [row.status for row in collect_rows(sweep)] == ["pending", "unfinished", "done"]


@pytest.mark.parametrize(
    "broken", ["[]", "1", "{}", '{"exit_code": 1}', '{"exit_code": "1", "time": 1e12}', "null"]
)
def test_an_invalid_record_is_ignored(tmp_path, broken):
    sweep = sweep_of(tmp_path, "a", "b")
    (sweep.folder / "jobs.json").write_text(f'{{"job0": {broken}}}')
    leave(sweep.jobs[1], ["done"])
    assert [row.status for row in collect_rows(sweep)] == ["pending", "pending"]


def test_a_table_that_cannot_be_written_raises_one_message(tmp_path):
    sweep = sweep_of(tmp_path, "a", "b")
    (sweep.folder / "index.html").mkdir()
    with pytest.raises(UserError, match=r"the table was not written .*index\.html"):
        show_sweep_table(sweep.jobs)


def test_no_file_of_a_sweep_holds_a_swept_secret(tmp_path, capsys):
    token = "hf_" + "aB3" * 11
    sweep = sweep_of(tmp_path, token, f"https://me:{token}@host/x")
    for job in sweep.jobs:
        leave(job, "done", SUMMARY)
    assert show_sweep_table(sweep.jobs) == 0
    assert "***" in (sweep.folder / "results.csv").read_text()
    files = [file for file in sweep.folder.rglob("*") if file.is_file()]
    assert [file for file in files if token.encode() in file.read_bytes()] == []
    assert token not in capsys.readouterr().out


def test_only_files_of_this_call_are_listed(tmp_path, capsys):
    sweep = sweep_of(tmp_path, "a", "b")
    (sweep.folder / "bits.png").write_text("from an earlier table")
    assert show_sweep_table(sweep.jobs) == 0
    assert "bits.png" not in capsys.readouterr().out


def test_the_csv_contains_the_results_of_the_jobs(tmp_path):
    sweep = sweep_of(tmp_path, "a", HOSTILE)
    leave(sweep.jobs[0], "done", SUMMARY)
    write_sweep_report(sweep)
    good, other = read_csv(sweep)
    assert list(good) == ["data.source", *COLUMNS, "status", "folder"]
    assert good["data.source"] == "a"
    assert float(good["perplexity_quantized"]) == 1234.5
    assert (good["perplexity_final"], good["status"]) == ("", "done")
    assert Path(good["folder"]) == sweep.jobs[0].folder
    assert other["data.source"] == HOSTILE
    assert other["status"] == "pending"


class Page(HTMLParser):
    """Collects what a browser would run, fetch and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.fetched, self.words = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.fetched += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.words += data + " "


def test_the_page_fetches_and_runs_nothing(tmp_path):
    sweep = sweep_of(tmp_path, "a", HOSTILE)
    for job in sweep.jobs:
        leave(job, "done", SUMMARY)
    write_sweep_report(sweep)
    page = Page((sweep.folder / "index.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert HOSTILE.strip() in page.words
    assert "2 jobs: 2 done" in page.words
    assert len(page.fetched) == 2, "without a final perplexity there is no plot against memory"
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched)


def test_a_sweep_without_finished_jobs_still_has_a_table(tmp_path, capsys):
    sweep = sweep_of(tmp_path, "a", "b")
    outcomes = JobResults(sweep)
    outcomes.record(sweep.jobs[0], 1)
    outcomes.save()
    assert show_sweep_table(sweep.jobs) == 0
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "pending" in shown
    assert "wrote" in shown
    assert {path.name for path in sweep.folder.iterdir()} == {
        "jobs.json", "logs", "results.csv", "index.html",
    }  # fmt: skip


def test_the_printed_table_is_rounded(tmp_path):
    sweep = sweep_of(tmp_path, "a", "b")
    leave(sweep.jobs[0], "done", SUMMARY)
    good = format_table(collect_rows(sweep)).splitlines()[-2].split()
    assert good == [
        "a", "2.50", "0.1000", "8.000", "1,234.500", "-", "0.6000", "0.2500", "0.5", "60.0",
        "2.000", "1,200", "done", "job0",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"quantize": {}}'])
def test_an_unreadable_summary_gives_no_figures(tmp_path, broken):
    sweep = sweep_of(tmp_path, "a", "b")
    leave(sweep.jobs[0], "done")
    (sweep.jobs[0].folder / "summary.json").write_text(broken)
    assert set(collect_rows(sweep)[0].figures.values()) == {None}
