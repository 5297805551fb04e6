"""The numbers that launchers and Slurm give a process, and the defaults without them."""

import pytest

from hqqtrain.common.env import (
    get_local_world_size,
    get_rank,
    get_slurm_job_id,
    get_world_size,
)

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID")


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
