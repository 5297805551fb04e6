"""DDP broadcasts a parameter from rank 0; a single process leaves it alone."""

import pytest
import torch
from memory_estimates import meta_model, two_bit_config
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


def test_what_stays_in_host_memory():
    config = two_bit_config()
    model = meta_model("tiny", config)
    names = {id(param): name for name, param in model.named_parameters()}

    def hosted(**settings: bool) -> set[str]:
        params = SingleProcess(SINGLE_PROCESS, **settings).host_parameters(model)
        return {names[id(param)] for param in params}

    meta = {name for name in names.values() if name.endswith((".scale", ".zero"))}
    assert hosted() == set()
    assert hosted(offloads_meta=True) == meta
    everything = hosted(offloads_parameters=True, offloads_meta=True)
    assert everything > meta
    assert everything == {n for n in names.values() if ".layers." in n and "lora_" not in n}


def test_only_ddp_may_run_with_several_processes_and_averages_gradients():
    assert not SingleProcess.supports.several_processes
    assert DDP.supports.several_processes
    assert (SingleProcess.uses_ddp, DDP.uses_ddp) == (False, True)
    weight = torch.ones(3)
    assert SingleProcess(SINGLE_PROCESS).roundtrip(weight) is weight
