"""The model that lm-evaluation-harness sees: its calls, and the ranks that share its requests."""

from typing import Any

import pytest
import torch
from fake_lm_eval import fake_lm_eval

from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator

__all__ = ["fake_lm_eval"]


class _SecondOfTwo(Communicator):
    def all_gather_object(self, value: Any) -> list[Any]:
        return ["other", value] if isinstance(value, str) else [3, value]


def _wrap(model: torch.nn.Module, comm: Communicator, *, shares: bool, calls: list[int]):
    from hqqtrain.evaluation.harness_model import InMemoryModel

    return InMemoryModel(model, model.config, None, comm, 2, lambda: calls.append(1), shares=shares)


@pytest.mark.usefixtures("fake_lm_eval")
def test_it_is_called_without_a_cache_and_without_gradients(make_model):
    calls: list[int] = []
    model, tokens = make_model(), torch.arange(6).view(2, 3)
    found = _wrap(model, SINGLE_PROCESS, shares=True, calls=calls)._model_call(tokens)
    assert not found.requires_grad
    assert torch.equal(found, model(tokens).logits)
    assert calls == [1]


@pytest.mark.usefixtures("fake_lm_eval")
def test_the_requests_are_shared_or_each_rank_has_all(make_model):
    comm = _SecondOfTwo(1, 2, torch.device("cpu"))
    lm = _wrap(make_model(), comm, shares=True, calls=[])
    assert (lm.rank, lm.world_size) == (1, 2)
    assert lm.all_gather(torch.tensor(4)).tolist() == [3, 4]
    assert lm.gather_object("own", dst=1) == ["other", "own"]
    assert lm.gather_object("own") is None
    alone = _wrap(make_model(), comm, shares=False, calls=[])
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.gather_object("own") == ["own"]
