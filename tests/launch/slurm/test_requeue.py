"""When a preempted job is requeued: which starts count as progress, and when the job ends."""

import json
import os
import re
from pathlib import Path

import pytest

from hqqtrain.launch.slurm.requeue import begin_attempt, end_attempt, main, read_attempt


@pytest.fixture
def folder(tmp_path) -> Path:
    """The directory of a run that has not created it yet."""
    return tmp_path / "runs" / "mine"


def start(folder: Path, code: int = 3, job: str = "7", **leaves: object) -> tuple[int, bool]:
    """Simulate a start of `job` that leaves a checkpoint of `step`, quantized/ or a status."""
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


def test_a_run_that_never_creates_its_directory_ends_after_two_starts(folder):
    assert start(folder) == (3, True)
    assert start(folder) == (3, False)
    assert not folder.exists()


@pytest.mark.parametrize("first", [{"step": 5}, {"quantized": True}])
def test_progress_of_the_first_start_allows_two_more(folder, first):
    assert start(folder, **first) == (3, True)
    assert start(folder) == (3, True)
    assert start(folder) == (3, False)


def test_progress_in_every_other_start_is_enough(folder):
    assert start(folder, step=5) == (3, True)
    assert start(folder) == (3, True)
    assert start(folder, step=9) == (3, True)
    assert start(folder) == (3, True)


def test_old_and_damaged_checkpoints_are_no_progress(folder):
    (folder / "quantized").mkdir(parents=True)
    (folder / "quantized" / "config.json").touch()
    (folder / "checkpoints" / "step-00000009").mkdir(parents=True)
    assert start(folder, step=4) == (3, True), "no progress past step 9, for the first time"
    (folder / "checkpoints" / "damaged-step-00000011").mkdir()
    assert start(folder, step=5) == (3, False)


def test_other_exit_codes_are_passed_on_and_reset_the_count(folder):
    assert start(folder) == (3, True)
    assert start(folder, code=1) == (1, False)
    assert start(folder) == (3, True)
    assert start(folder, code=0) == (0, False)
    assert read_attempt(folder)["exit_code"] == 0


def test_a_job_that_is_submitted_again_has_two_starts_again(folder):
    assert start(folder) == (3, True)
    assert start(folder, job="8") == (3, True)
    assert start(folder, job="8") == (3, False)


def test_a_node_failure_does_not_count_as_a_preemption(folder):
    assert start(folder) == (3, True)
    begin_attempt(folder, "7")
    assert read_attempt(folder)["exit_code"] is None
    assert start(folder) == (3, False)


def test_killed_ranks_do_not_hide_the_exit_code_of_the_run(folder):
    preempted = {"status": "preempted", "exit_code": 3, "pid": 1}
    assert start(folder, code=143, status=preempted) == (3, True)
    assert start(folder, code=137) == (137, False), "the status is from the previous start"
    assert start(folder, code=137, status={"status": "running", "exit_code": None}) == (137, False)
    assert start(folder, code=137, status=["what"]) == (137, False)


@pytest.mark.parametrize("broken", ["", "[]", '{"job": "7"}', '{"job": "7", "fruitless": "1"}'])
def test_an_invalid_record_is_ignored(folder, broken):
    assert start(folder) == (3, True)
    (folder.parent / "slurm" / "mine.json").write_text(broken)
    assert read_attempt(folder) == {}
    assert start(folder) == (3, True)
    assert start(folder) == (3, False)


def test_array_tasks_are_requeued_by_the_id_that_scontrol_uses(folder, monkeypatch, capfd):
    """With a fake scontrol. The SLURM_JOB_ID of an array's last task is the id of the array."""
    (folder.parent / "bin").mkdir(parents=True)
    program = folder.parent / "bin" / "scontrol"
    program.write_text('#!/bin/sh\necho "$@" >>"$CALLS"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(folder.parent / "calls"))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    for _ in range(2):
        assert main(["begin", str(folder)]) == 0
        assert main(["end", str(folder), "3"]) == 3
    assert (folder.parent / "calls").read_text() == "requeue 12_3\n"
    first, second = capfd.readouterr().err.splitlines()
    assert "preempted; requeued" in first
    assert "preempted 2 times in a row" in second
    assert "ckpt.every" in second


def test_a_job_whose_record_cannot_be_written_is_not_requeued(folder, monkeypatch, capfd):
    begin_attempt(folder, "")
    slurm = folder.parent / "slurm"
    (slurm / "mine.json").unlink()
    slurm.rmdir()
    slurm.touch()
    monkeypatch.setenv("PATH", "")  # scontrol cannot be called
    assert main(["end", str(folder), "3"]) == 3
    assert main(["begin", str(folder)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(re.match(r"hqqtrain: error: run.root=.*: cannot be written to", x) for x in lines)
