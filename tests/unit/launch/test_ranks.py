"""Slurm's environment variables for ranks, translated to those of torchrun."""

import pytest

from hqqtrain.launch.ranks import adopt_ranks, first_host, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[07-08],login",
    "SLURM_STEP_NUM_TASKS": "9", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
"""The variables that srun sets in a task, observed with Slurm 22.05."""


def _adopted(**changes: str) -> dict[str, str]:
    """Return the variables that are added to the environment of a task."""
    environ = {**STEP, **changes}
    before = dict(environ)
    adopt_ranks(environ)
    return {k: v for k, v in environ.items() if before.get(k) != v}


def test_a_task_of_a_step_is_a_rank():
    assert _adopted() == {
        "RANK": "5", "WORLD_SIZE": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07", "MASTER_PORT": str(15_000 + (47_112 % 14_000)),
    }  # fmt: skip
    assert _adopted(SLURM_NODEID="2", SLURM_PROCID="8")["LOCAL_WORLD_SIZE"] == "1"


@pytest.mark.parametrize("name", ["RANK", "ACCELERATE_MIXED_PRECISION"])
def test_ranks_of_other_launchers_are_kept(name):
    assert _adopted(**{name: "0"}) == {}


def test_one_task_or_no_step_stays_one_process():
    assert _adopted(SLURM_STEP_NUM_TASKS="1") == {}
    environ = {"SLURM_NTASKS": "9", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}
    adopt_ranks(environ)
    assert "RANK" not in environ


def test_a_given_master_address_is_kept():
    chosen = _adopted(MASTER_ADDR="10.0.0.7", MASTER_PORT="29500")
    assert "MASTER_ADDR" not in chosen
    assert "MASTER_PORT" not in chosen


def test_jobs_and_steps_use_different_ports():
    ports = [
        _adopted(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))["MASTER_PORT"]
        for job in range(70_000, 71_000)
        for step in (0, 1, 9)
    ]
    assert len(set(ports)) == len(ports)
    assert all(15_000 <= int(port) < 29_000 for port in ports)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("gpu[03-05,9],login", "gpu03"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]n[03,05-9],x", "rack1n03"),
        ("10.0.0.[1-2]", "10.0.0.1"),
        ("c-ib[7]-x.local", "c-ib7-x.local"),
    ],
)
def test_first_host_of_a_host_list(hosts, first):
    assert first_host(hosts) == first


def test_tasks_per_node():
    assert tasks_per_node("2") == [2]
    assert tasks_per_node("4(x2),1,3(x3)") == [4, 4, 1, 3, 3, 3]
