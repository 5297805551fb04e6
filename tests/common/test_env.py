"""The numbers that launchers and Slurm give a process, and the defaults without them."""

import pytest

from hqqtrain.cli import main
from hqqtrain.common.env import (
    check_rank_variables,
    get_local_world_size,
    get_rank,
    get_slurm_job_id,
    get_world_size,
)

NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_without_a_launcher():
    assert (get_rank(), get_world_size(), get_local_world_size()) == (0, 1, 0)
    assert get_slurm_job_id() is None


def test_a_process_of_torchrun(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "9"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert (get_rank(), get_world_size(), get_local_world_size()) == (5, 9, 4)


def test_a_task_of_an_array_has_an_id_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert get_slurm_job_id() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert get_slurm_job_id() == "12_3"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "abc"}, "RANK=abc: must be a number."),
        ({"RANK": "-1"}, "RANK=-1: must be a number."),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: must be a number."),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5: must be below WORLD_SIZE=2."),
        ({"WORLD_SIZE": "0"}, "RANK=0: must be below WORLD_SIZE=0."),
    ],
)
def test_wrong_numbers_are_one_message(monkeypatch, capsys, values, message):
    check_rank_variables()
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert main(["--check"]) == 2
    assert capsys.readouterr().err.startswith(f"hqqtrain: error: {message}")


def test_processes_that_have_no_address_to_meet_at(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["recipe=tiny_2bit", f"run.root={tmp_path}"]) == 2
    assert "hqqtrain: error: WORLD_SIZE=2: needs MASTER_ADDR" in capsys.readouterr().err
