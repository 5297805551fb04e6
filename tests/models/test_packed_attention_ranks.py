"""Documents reach the layers of a wrapped model: gradients are those of the path with a mask."""

import pytest
import torch
from ranks import CPU, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.data.layout import Batch
from hqqtrain.distributed.comm import Communicator
from hqqtrain.models.causal_lm import model_inputs, next_token_outputs
from hqqtrain.models.packed_attention import use_packed_attention
from hqqtrain.training.activation_checkpointing import apply_activation_checkpointing

pytestmark = pytest.mark.ranks

LENGTHS = ((5, 1, 10, 3, 13), (16, 1, 1, 14))
"""The documents in the two rows of each rank."""


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, dtype=torch.float32)
    ).train()  # fmt: skip


def make_batch(rank: int) -> Batch:
    positions = torch.cat([torch.arange(length) for length in LENGTHS[rank]]).view(2, -1)
    tokens = torch.randint(96, positions.shape, generator=torch.Generator().manual_seed(rank))
    return {"input_ids": tokens, "labels": tokens, "position_ids": positions,
            "document_lengths": torch.tensor(LENGTHS[rank])}  # fmt: skip


def loss_of(model: torch.nn.Module, rank: int) -> torch.Tensor:
    logits, labels = next_token_outputs(model, make_batch(rank))
    return torch.nn.functional.cross_entropy(logits, labels)


def wrapped(rank: int, comm: Communicator, strategy: str) -> None:
    masked = make_model()
    (sum(loss_of(masked, r) for r in range(comm.size)) / comm.size).backward()
    model = make_model()
    apply_activation_checkpointing(model, offload=True)
    whole: torch.nn.Module = model
    if strategy == "fsdp2":
        mesh = init_device_mesh("cpu", (comm.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if strategy == "fsdp1":
        whole = FullyShardedDataParallel(model, use_orig_params=True, device_id=CPU)
    if strategy == "ddp":
        whole = DistributedDataParallel(model, init_sync=False)
    assert use_packed_attention(whole) == ""
    assert "documents" in model_inputs(whole, make_batch(rank))
    loss_of(whole, rank).backward()
    if strategy == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(whole, with_grads=True):
            grads = [p.grad.clone() for p in model.parameters()]
    else:
        grads = [
            p.grad.full_tensor() if strategy == "fsdp2" else p.grad for p in model.parameters()
        ]
    for ours, theirs in zip(grads, masked.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp1"])
def test_documents_pass_through_wrappers(strategy: str) -> None:
    assert on_ranks(wrapped, 2, strategy) == ["", ""]
