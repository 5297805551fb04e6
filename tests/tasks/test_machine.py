"""A plan is for the GPUs that its keys name, or for this machine."""

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.common.gpus import GIB, GPUS
from hqqtrain.config.infra import LaunchConfig
from hqqtrain.config.plan import PlanConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.tasks.machine import OUTSIDE_BYTES, find_machine


def test_a_named_gpu():
    machine = find_machine(RunConfig(plan=PlanConfig(gpu="H100", gpus=16)))
    assert (str(machine), machine.nodes, machine.device.type) == ("16 x H100", 2, "cuda")
    assert machine.usable == GPUS["H100"].memory - OUTSIDE_BYTES
    assert machine.kinds() == {"H100": GPUS["H100"]}


def test_a_size_stands_for_all_gpus_that_have_it():
    machine = find_machine(RunConfig(plan=PlanConfig(gpu="24GB")))
    assert machine.ranks == 1
    assert {"RTX 4090", "RTX 3090"} <= machine.kinds().keys()
    assert "H100" not in machine.kinds()


def test_a_job_has_the_gpus_that_it_requests():
    launch = LaunchConfig(backend="slurm", nodes=2, gpus_per_node=4)
    assert find_machine(RunConfig(plan=PlanConfig(gpu="A100"), launch=launch)).ranks == 8


def test_a_machine_without_a_gpu_has_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine = find_machine(RunConfig())
    assert (str(machine), machine.device.type, machine.kinds()) == ("CPU", "cpu", {})
    assert machine.usable > GIB / 10
    with pytest.raises(UserError, match="name their kind"):
        find_machine(RunConfig(plan=PlanConfig(gpus=2)))
