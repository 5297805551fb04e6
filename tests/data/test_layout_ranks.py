"""Ranks whose texts need different numbers of batches train alike, and none waits forever."""

import pytest
import torch
from architectures import IN_ROWS, small_config, small_model
from packed_texts import MAX_SEQ_LEN, ROWS, make_loader, packed_sequences
from ranks import on_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.training.losses.model_loss import ModelLoss
from hqqtrain.training.losses.next_token import NextTokenLoss

pytestmark = pytest.mark.ranks


def micro_batches(rank: int, world_size: int, batch_index: int) -> int:
    """Return the number of micro-batches of a rank by itself."""
    loader = make_loader(ROWS, rank, world_size, micro_batch_size=1)
    samples = loader.describe(batch_index)["samples"][rank::world_size]
    return len(ROWS.training_batches(packed_sequences().select(samples), 1, MAX_SEQ_LEN))


UNEVEN = next(i for i in range(100) if micro_batches(0, 2, i) != micro_batches(1, 2, i))
"""Index of a global batch of which the ranks need different numbers of micro-batches."""


def gradients(comm: Communicator, mesh: DeviceMesh | None = None) -> dict[str, torch.Tensor]:
    """Return the gradients of the sum of the losses of one global batch."""
    model = small_model(small_config("opt", IN_ROWS["opt"] | {"dropout": 0.0})).train()
    if mesh is not None:
        for layer in model.model.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    loss = ModelLoss(model, NextTokenLoss(), comm, max_tokens=64)
    for batch in make_loader(ROWS, comm.rank, comm.size, micro_batch_size=1).batches(UNEVEN):
        (loss(batch)[0] * comm.size).backward()  # FSDP averages gradients over ranks
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads if mesh is None else {n: grad.full_tensor() for n, grad in grads.items()}


def train(rank: int, comm: Communicator) -> None:
    ours, expected = gradients(comm, init_device_mesh("cpu", (2,))), gradients(SINGLE_PROCESS)
    assert ours.keys() == expected.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_ranks_with_different_numbers_of_batches():
    assert on_ranks(train, 2) == ["", ""]
