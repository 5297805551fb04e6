"""The chunked loss on ranks whose batches differ in length: no rank may wait forever."""

import pytest
import torch
from ranks import CPU, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.training.losses import model_loss as module
from hqqtrain.training.losses.linear_cross_entropy import LinearCrossEntropy
from hqqtrain.training.losses.model_loss import ModelLoss
from hqqtrain.training.losses.next_token import NextTokenLoss

pytestmark = pytest.mark.ranks

LENGTHS = (40, 6, 21)


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, dtype=torch.float32)
    ).train()  # fmt: skip


def make_batch(rank: int) -> dict[str, torch.Tensor]:
    ids = (torch.arange(LENGTHS[rank]) * 7 + rank)[None] % 96
    return {"input_ids": ids, "labels": ids.clone()}


def ragged(rank: int, comm: Communicator, strategy: str) -> None:
    module.MAX_TRAINING_LOGITS = 10 * 96
    strategy, _, fused = strategy.partition("+")
    alone = make_model()
    expected = torch.stack([
        alone(**make_batch(r), use_cache=False).loss * (LENGTHS[r] - 1)
        for r in range(comm.size)
    ])  # fmt: skip
    (expected.sum() / comm.size).backward()
    model = make_model()
    model.lm_head.requires_grad_(not fused)
    if strategy == "fsdp2":
        mesh = init_device_mesh("cpu", (comm.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    whole: torch.nn.Module = model
    if strategy == "fsdp1":  # as the strategy does it: frozen layers sharded, the rest under DDP
        layers = model.model.layers.requires_grad_(False)
        for number, layer in enumerate(layers):
            layers[number] = FullyShardedDataParallel(layer, use_orig_params=True, device_id=CPU)
        outside = [p for p in model.parameters() if p.requires_grad]
        whole = FullyShardedDataParallel(
            model, ignored_states=outside, use_orig_params=True, device_id=CPU
        )
    if strategy in ("ddp", "fsdp1"):
        whole = DistributedDataParallel(whole, init_sync=False, broadcast_buffers=False)
    loss_of_head = LinearCrossEntropy() if fused else None
    found = ModelLoss(whole, NextTokenLoss(), comm, max_tokens=max(LENGTHS), fused=loss_of_head)
    assert found.is_chunked
    assert not fused or found._loss is loss_of_head
    loss, _ = found(make_batch(rank))
    loss.backward()
    torch.testing.assert_close(loss, expected[rank].detach())
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        if not ours.requires_grad:
            continue
        grad = ours.grad.full_tensor() if strategy == "fsdp2" else ours.grad
        torch.testing.assert_close(grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2+fused", "ddp", "fsdp1"])
def test_ranks_with_batches_of_different_lengths(strategy):
    assert on_ranks(ragged, 3, strategy) == [""] * 3


def test_single_process(monkeypatch):
    monkeypatch.setattr(module, "MAX_TRAINING_LOGITS", 10 * 96)
    model = make_model()
    batch = make_batch(0)
    expected = model(**batch, use_cache=False).loss * (LENGTHS[0] - 1)
    loss = ModelLoss(model, NextTokenLoss(), SINGLE_PROCESS, max_tokens=40)
    torch.testing.assert_close(loss(batch)[0], expected)
