"""The folder of a sweep: a CSV file, plots and a page that fetches nothing and shows no secret."""

import csv
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from sweeps import HOSTILE_TEXT, SUMMARY, make_sweep, write_run_files

from hqqtrain.common.errors import UserError
from hqqtrain.launch.sweep.report import create_sweep_folder, print_sweep_table, write_sweep_report
from hqqtrain.launch.sweep.results import COLUMNS, JobResults
from hqqtrain.launch.sweep.runner import show_sweep_table
from hqqtrain.launch.sweep.sweep import Sweep


def read_csv(sweep: Sweep) -> list[dict[str, str]]:
    with (sweep.folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_that_cannot_be_written_raises_one_message(tmp_path):
    sweep = make_sweep(tmp_path, "a", "b")
    (sweep.folder / "index.html").mkdir()
    with pytest.raises(UserError, match=r"the table was not written .*index\.html"):
        show_sweep_table(sweep.jobs)


def test_no_file_of_a_sweep_holds_a_swept_secret(tmp_path, capsys):
    token = "hf_" + "aB3" * 11
    sweep = make_sweep(tmp_path, token, f"https://me:{token}@host/x")
    for job in sweep.jobs:
        write_run_files(job, "done", SUMMARY)
    assert show_sweep_table(sweep.jobs) == 0
    assert "***" in (sweep.folder / "results.csv").read_text()
    files = [file for file in sweep.folder.rglob("*") if file.is_file()]
    assert [file for file in files if token.encode() in file.read_bytes()] == []
    assert token not in capsys.readouterr().out


def test_only_files_of_this_call_are_listed(tmp_path, capsys):
    sweep = make_sweep(tmp_path, "a", "b")
    (sweep.folder / "bits.svg").write_text("from an earlier table")
    assert show_sweep_table(sweep.jobs) == 0
    assert "bits.svg" not in capsys.readouterr().out


def test_the_csv_contains_the_results_of_the_jobs(tmp_path):
    sweep = make_sweep(tmp_path, "a", HOSTILE_TEXT)
    write_run_files(sweep.jobs[0], "done", SUMMARY)
    write_sweep_report(sweep)
    good, other = read_csv(sweep)
    assert list(good) == ["data.source", *COLUMNS, "status", "folder"]
    assert good["data.source"] == "a"
    assert float(good["perplexity_quantized"]) == 1234.5
    assert (good["perplexity_final"], good["status"]) == ("", "done")
    assert Path(good["folder"]) == sweep.jobs[0].folder
    assert other["data.source"] == HOSTILE_TEXT
    assert other["status"] == "pending"


class Page(HTMLParser):
    """Collects what a browser would run, fetch and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.fetched, self.plots, self.words = set(), [], 0, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.plots += tag == "svg"
        self.fetched += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.words += data + " "


def test_the_page_fetches_and_runs_nothing(tmp_path):
    sweep = make_sweep(tmp_path, "a", HOSTILE_TEXT)
    for job in sweep.jobs:
        write_run_files(job, "done", SUMMARY)
    write_sweep_report(sweep)
    page = Page((sweep.folder / "index.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert HOSTILE_TEXT.strip() in page.words
    assert "2 jobs: 2 done" in page.words
    assert page.plots == 2, "without a final perplexity there is no plot against memory"
    assert page.fetched == []
    assert all("<script" not in file.read_text() for file in sweep.folder.glob("*.svg"))


def test_the_page_links_to_the_report_of_each_job_that_has_one(tmp_path):
    sweep = make_sweep(tmp_path, "a", "b", "c")
    sweep.jobs[1].config.run.name = "b #1?<i>%"
    for job in sweep.jobs[:2]:
        write_run_files(job, "done", SUMMARY)
        job.layout.report.mkdir()
        job.layout.report_html.write_text("the report")
    write_sweep_report(sweep)
    page = Page((sweep.folder / "index.html").read_text(encoding="utf-8"))
    assert [(sweep.folder / unquote(link)).resolve() for link in page.fetched] == [
        job.layout.report_html.resolve() for job in sweep.jobs[:2]
    ]
    assert page.fetched[1].isascii()
    assert "b #1?<i>%" in page.words
    assert "job2" in page.words


@pytest.mark.parametrize(("status", "refreshes"), [("running", True), ("done", False)])
def test_the_page_of_a_sweep_that_goes_on_is_loaded_again(tmp_path, status, refreshes):
    sweep = make_sweep(tmp_path, "a", "b")
    for job in sweep.jobs:
        write_run_files(job, status, SUMMARY)
    write_sweep_report(sweep)
    assert ("refresh" in (sweep.folder / "index.html").read_text()) is refreshes


def test_a_sweep_without_finished_jobs_still_has_a_table(tmp_path, capsys):
    sweep = make_sweep(tmp_path, "a", "b")
    results = JobResults(sweep)
    results.record(sweep.jobs[0], 1)
    results.save()
    assert show_sweep_table(sweep.jobs) == 0
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "pending" in shown
    assert "wrote" in shown
    assert {path.name for path in sweep.folder.iterdir()} == {
        "jobs.json", "logs", "results.csv", "index.html",
    }  # fmt: skip


def test_a_folder_that_cannot_be_created_is_an_error_with_its_key(tmp_path):
    sweep = make_sweep(tmp_path, "a", "b")
    for path in (sweep.folder / "logs", sweep.folder):
        path.rmdir()
    sweep.folder.write_text("a file is in the way")
    with pytest.raises(UserError, match=rf"^run\.root={tmp_path}: cannot be written to"):
        create_sweep_folder(sweep)


def test_results_that_are_not_saved_yet_are_in_the_table(tmp_path, capsys):
    sweep = make_sweep(tmp_path, "a", "b")
    results = JobResults(sweep)
    results.record(sweep.jobs[1], 1)
    print_sweep_table(sweep, results)
    assert [row["status"] for row in read_csv(sweep)] == ["pending", "failed"]
    assert "failed" in capsys.readouterr().out
