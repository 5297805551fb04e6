"""What becomes of a job: which starts count as one that got further, and when it is enough."""

import json
import os
from pathlib import Path

import pytest

from hqqtrain.launch.slurm.requeue import begin_attempt, end_attempt, main, read_attempt


@pytest.fixture
def folder(tmp_path) -> Path:
    """That of a run which has not begun it yet."""
    return tmp_path / "runs" / "mine"


def start(folder: Path, code: int = 3, job: str = "7", **leaves: object) -> tuple[int, bool]:
    """One start of `job` that leaves a checkpoint of `step`, quantized/ or a status behind."""
    begin_attempt(folder, job)
    if "step" in leaves:
        (folder / "checkpoints" / f"step-{leaves['step']:08}").mkdir(parents=True)
    if "quantized" in leaves:
        (folder / "quantized").mkdir(parents=True)
        (folder / "quantized" / "config.json").write_text("{}")
    if "status" in leaves:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "status.json").write_text(json.dumps(leaves["status"]))
    return end_attempt(folder, code, job)


def test_a_run_that_never_gets_to_begin_its_directory_ends_after_two_starts(folder):
    assert start(folder) == (3, True)
    assert start(folder) == (3, False)
    assert not folder.exists()


@pytest.mark.parametrize("first", [{"step": 5}, {"quantized": True}])
def test_of_two_starts_the_first_got_further(folder, first):
    assert start(folder, **first) == (3, True)
    assert start(folder) == (3, True)
    assert start(folder) == (3, False)


def test_of_two_starts_the_second_got_further(folder):
    assert start(folder, step=5) == (3, True)
    assert start(folder) == (3, True)
    assert start(folder, step=9) == (3, True)
    assert start(folder) == (3, True)


def test_what_was_there_before_or_is_set_aside_is_no_progress(folder):
    (folder / "quantized").mkdir(parents=True)
    (folder / "quantized" / "config.json").touch()
    (folder / "checkpoints" / "step-00000009").mkdir(parents=True)
    assert start(folder, step=4) == (3, True), "as far as it was long ago"
    (folder / "checkpoints" / "damaged-step-00000011").mkdir()
    assert start(folder, step=5) == (3, False)


def test_other_ends_are_the_jobs_and_begin_the_count_anew(folder):
    assert start(folder) == (3, True)
    assert start(folder, code=1) == (1, False)
    assert start(folder) == (3, True)
    assert start(folder, code=0) == (0, False)
    assert read_attempt(folder)["exit_code"] == 0


def test_a_job_that_was_submitted_anew_has_two_starts_again(folder):
    assert start(folder) == (3, True)
    assert start(folder, job="8") == (3, True)
    assert start(folder, job="8") == (3, False)


def test_a_node_that_died_is_no_preemption(folder):
    assert start(folder) == (3, True)
    begin_attempt(folder, "7")
    assert read_attempt(folder)["exit_code"] is None
    assert start(folder) == (3, False)


def test_ranks_that_were_ended_do_not_hide_the_runs_own_code(folder):
    preempted = {"status": "preempted", "exit_code": 3, "pid": 1}
    assert start(folder, code=143, status=preempted) == (3, True)
    assert start(folder, code=137) == (137, False), "what it says is of the start before"
    assert start(folder, code=137, status={"status": "running", "exit_code": None}) == (137, False)
    assert start(folder, code=137, status=["what"]) == (137, False)


@pytest.mark.parametrize("broken", ["", "[]", '{"job": "7"}', '{"job": "7", "fruitless": "1"}'])
def test_a_note_that_cannot_be_read_is_none(folder, broken):
    assert start(folder) == (3, True)
    (folder.parent / "slurm" / "mine.json").write_text(broken)
    assert read_attempt(folder) == {}
    assert start(folder) == (3, True)
    assert start(folder) == (3, False)


def test_jobs_are_known_as_scontrol_knows_them(folder, monkeypatch, capfd):
    """With a stand-in for scontrol: the last task of an array has the array's SLURM_JOB_ID."""
    (folder.parent / "bin").mkdir(parents=True)
    program = folder.parent / "bin" / "scontrol"
    program.write_text('#!/bin/sh\necho "$@" >>"$TOLD"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TOLD", str(folder.parent / "told"))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    for _ in range(2):
        assert main(["begin", str(folder)]) == 0
        assert main(["end", str(folder), "3"]) == 3
    assert (folder.parent / "told").read_text() == "requeue 12_3\n"
    first, second = capfd.readouterr().err.splitlines()
    assert "requeued, to go on" in first
    assert "preempted 2 times in a row" in second
    assert "ckpt.every" in second


def test_what_cannot_be_noted_is_not_requeued(folder, monkeypatch, capfd):
    begin_attempt(folder, "")
    slurm = folder.parent / "slurm"
    (slurm / "mine.json").unlink()
    slurm.rmdir()
    slurm.touch()
    monkeypatch.setenv("PATH", "")  # no scontrol is asked
    assert main(["end", str(folder), "3"]) == 3
    assert main(["begin", str(folder)]) == 2
    assert capfd.readouterr().err.count("cannot be written to") == 2
