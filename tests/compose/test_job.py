"""A job: its folder, the arguments that start it, and what its run has written so far."""

import json

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.compose.compose import compose_config
from hqqtrain.compose.job import Job
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.rundir.schema import Status, Summary

TOKEN = "hf_" + "aB3" * 11


def _job(root, *overrides: str) -> Job:
    words = [f"run.root={root}", *overrides]
    return Job(words, compose_config(words))


def _finish(job: Job, **summary) -> None:
    with RunDirectory(job.config) as directory:
        directory.begin([])
        directory.write_summary({"schema": 1, **summary})
        directory.write_status("done", exit_code=0)


def test_the_folder_is_that_of_the_run(tmp_path):
    job = _job(tmp_path, "quant.nbits=2")
    assert job.folder == RunDirectory(job.config).path
    assert job.name == job.config.run_name()


def test_a_root_in_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["run.root='~/runs'", "run.name=x"]
    assert Job(words, compose_config(words)).folder == tmp_path / "runs" / "x"


def test_arguments_are_the_jobs_own_and_the_shared_ones():
    words = ["quant.nbits=2", "launch.max_parallel_jobs=4"]
    job = Job(words, compose_config(words), ("track.group=g",))
    assert job.arguments == ["quant.nbits=2", "track.group=g"]
    assert job.overrides == words


def test_a_job_is_shown_quoted_and_without_secrets():
    words = ["data.source='a b'", f"model.name_or_path={TOKEN}"]
    shown = str(Job(words, compose_config(words)))
    assert shown == """'data.source='"'"'a b'"'"'' 'model.name_or_path=***'"""


def test_a_job_that_has_not_run_has_no_results(tmp_path):
    job = _job(tmp_path)
    assert (job.read_status(), job.read_summary()) == (Status(), Summary(schema=None))
    assert job.format_metrics() == ""
    assert not job.is_done()
    assert not job.folder.exists()


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"quantize": 3, "eval": []}', "\x00"])
def test_damaged_results_are_no_results(tmp_path, text):
    job = _job(tmp_path)
    job.folder.mkdir(parents=True)
    job.layout.status_json.write_text(text)
    job.layout.summary_json.write_text(text)
    assert job.format_metrics() == ""
    assert not job.is_done()


def test_figures_that_are_known_are_formatted_in_the_order_of_the_run(tmp_path):
    job = _job(tmp_path)
    job.folder.mkdir(parents=True)
    evaluation = {"final": {"perplexity": 6.32}, "quantized": {"perplexity": 9.1, "kl": 0.1}}
    job.layout.summary_json.write_text(
        json.dumps({"quantize": {"bits_per_weight": 2.5}, "eval": evaluation})
    )
    assert job.format_metrics() == (
        ": 2.50 bits per weight, perplexity 9.100 quantized, perplexity 6.320 trained"
    )


def test_a_job_is_done_if_this_very_configuration_has_finished(tmp_path):
    job = _job(tmp_path, "run.name=x", "train.max_steps=2")
    _finish(job)
    assert job.is_done()
    assert not _job(tmp_path, "run.name=x", "train.max_steps=3").is_done()
    with pytest.raises(UserError, match="another configuration"):
        _job(tmp_path, "run.name=x", "quant.nbits=2").is_done()


def test_changed_inputs_of_a_finished_job_are_an_error(tmp_path):
    (tmp_path / "text.txt").write_text("old")
    job = _job(tmp_path / "runs", f"data.source={tmp_path / 'text.txt'}")
    _finish(job)
    assert job.is_done()
    (tmp_path / "text.txt").write_text("new text")
    with pytest.raises(UserError, match="its input files have changed since"):
        job.is_done()
