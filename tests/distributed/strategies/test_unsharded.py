"""DDP broadcasts a parameter from rank 0; a single process leaves it alone."""

import pytest
import torch
from ranks import on_ranks

from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.strategies.unsharded import DDP, SingleProcess


def rank0_wins(rank: int, comm: Communicator) -> None:
    given = torch.arange(5.0) + 100 * rank
    found = DDP(comm).roundtrip(given)
    assert torch.equal(found, torch.arange(5.0))
    assert torch.equal(given, torch.arange(5.0) + 100 * rank), "the argument is not modified"


@pytest.mark.ranks
def test_replicas_have_the_weight_of_rank_0():
    assert on_ranks(rank0_wins, 2) == ["", ""]


def test_only_ddp_may_run_with_several_processes_and_averages_gradients():
    assert not SingleProcess.supports.several_processes
    assert DDP.supports.several_processes
    assert (SingleProcess.uses_ddp, DDP.uses_ddp) == (False, True)
    weight = torch.ones(3)
    assert SingleProcess(SINGLE_PROCESS).roundtrip(weight) is weight
