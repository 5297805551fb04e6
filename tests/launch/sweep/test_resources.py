"""The partition of the machine's GPUs and cores among parallel jobs."""

import os

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.launch.sweep import resources
from hqqtrain.launch.sweep.resources import partition_devices, visible_gpus


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)


def test_a_job_that_runs_alone_gets_the_whole_machine():
    assert partition_devices(1, {"CUDA_VISIBLE_DEVICES": "0,1"}) == [{}]


@pytest.mark.parametrize(
    ("listed", "jobs", "shares"),
    [
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("5, 7", 2, ["5", "7"]),
        ("0,1,2,3,4", 2, ["0,1", "2,3"]),
        ("GPU-a,MIG-b,GPU-c", 3, ["GPU-a", "MIG-b", "GPU-c"]),
    ],
)
def test_gpus_are_partitioned_evenly(listed, jobs, shares):
    envs = partition_devices(jobs, {"CUDA_VISIBLE_DEVICES": listed})
    assert [env["CUDA_VISIBLE_DEVICES"] for env in envs] == shares


def test_gpus_are_counted_without_cuda_visible_devices(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU 0: X (UUID: a)\\n  MIG 1g: y\\nGPU 1: X\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert visible_gpus({}) == ["0", "1"]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in partition_devices(2, {})] == ["0", "1"]


def test_more_jobs_than_gpus_are_refused():
    with pytest.raises(
        UserError,
        match=r"launch.max_parallel_jobs=3: .* and 2 are visible; use launch.max_parallel_jobs=2",
    ):
        partition_devices(3, {"CUDA_VISIBLE_DEVICES": "0,1"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"NPROC": "4"}, "NPROC=4: with launch.max_parallel_jobs=2 a job has 2 of 4 GPUs"),
        ({"NNODES": "2"}, "with NNODES=2 jobs cannot run in parallel"),
        ({"MASTER_PORT": "29500"}, "with MASTER_PORT=29500 jobs cannot run in parallel"),
    ],
)
def test_settings_for_the_whole_machine_are_refused(more, message):
    with pytest.raises(UserError, match=message):
        partition_devices(2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", **more})


@pytest.mark.parametrize(
    ("jobs", "environ", "threads"),
    [(2, {}, "4"), (3, {}, "2"), (16, {}, "1"), (2, {"NPROC": "2"}, "2")],
)
def test_without_gpus_the_cores_are_partitioned(jobs, environ, threads):
    envs = partition_devices(jobs, {"CUDA_VISIBLE_DEVICES": "", **environ})
    assert envs == [{"OMP_NUM_THREADS": threads}] * jobs


def test_the_users_omp_num_threads_is_kept():
    assert partition_devices(2, {"CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "3"}) == [{}, {}]


def test_cores_are_partitioned_among_the_processes_of_all_gpus():
    envs = partition_devices(2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert {env["OMP_NUM_THREADS"] for env in envs} == {"2"}


def test_a_machine_without_nvidia_smi_has_no_gpus(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert resources.visible_gpus({}) == []
