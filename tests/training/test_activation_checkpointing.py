"""Layers that recompute give the same gradients; offloaded inputs leave the device."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.models.families.structure import checkpointed_layers
from hqqtrain.training.activation_checkpointing import (
    apply_activation_checkpointing,
    recompute_first,
)
from hqqtrain.training.offloaded_inputs import OffloadedInputs

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "dtype": torch.float32,
}  # fmt: skip


def make_inputs(rows: int = 2, tokens: int = 20) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 96, (rows, tokens))}


def reference(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits.square().mean()


def seeded_reference(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(1)
    return reference(model, inputs)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_any_number_of_layers_gives_the_same_bits(number: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 4}, attention_dropout=0.1)
    model, inputs = LlamaForCausalLM(config).train(), make_inputs()
    wanted = gradients(model, seeded_reference(model, inputs))
    apply_activation_checkpointing(model, offload=False)
    recompute_first(checkpointed_layers(model), number)
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    found = gradients(model, seeded_reference(model, inputs))
    assert all(map(torch.equal, found, wanted))
    assert calls == [0, 1, 2, 3, *reversed(range(number))], "the first layers recompute"


def test_the_output_of_the_embeddings_may_be_changed_in_place() -> None:
    """GIT adds the embeddings of the positions to it."""
    torch.manual_seed(0)
    model, inputs = LlamaForCausalLM(LlamaConfig(**SIZES)).train(), make_inputs()
    apply_activation_checkpointing(model, offload=False)
    embeddings = model.get_input_embeddings().requires_grad_(False)
    embeddings.register_forward_hook(lambda module, inputs, output: output.add_(1.0))
    reference(model, inputs).backward()
    assert model.lm_head.weight.grad is not None


def test_offloading_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the inputs of the layers are copied, in two micro-batches of different length."""
    monkeypatch.setattr(OffloadedInputs, "copies_on_cpu", True)
    monkeypatch.setattr("hqqtrain.training.offloaded_inputs.MIN_NUMEL", 1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 5})).train()
    batches = [make_inputs(tokens=tokens) for tokens in (20, 7, 31)]
    wanted = [gradients(model, reference(model, inputs)) for inputs in batches]
    copied: list[int] = []
    take = OffloadedInputs.take_buffer
    monkeypatch.setattr(
        OffloadedInputs, "take_buffer", lambda host, size: copied.append(size) or take(host, size)
    )
    apply_activation_checkpointing(model, offload=True)
    for inputs, grads in zip(batches, wanted, strict=True):
        assert all(map(torch.equal, gradients(model, reference(model, inputs)), grads))
    layers = [size for size in copied if size]  # torch 2.11 adds empty tensors
    assert layers == [2 * tokens * 32 * 4 for tokens in (20, 7, 31) for _ in range(5)]


@pytest.mark.gpu
def test_offloaded_inputs_leave_the_gpu() -> None:
    config = LlamaConfig(**SIZES | {"hidden_size": 512, "num_hidden_layers": 8})
    inputs = {k: v.cuda() for k, v in make_inputs(1, 8192).items()}

    def kept(offload: bool) -> int:
        """Return the bytes that the second forward pass keeps for the backward pass."""
        model = LlamaForCausalLM(config).cuda().train().requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_()
        apply_activation_checkpointing(model, offload=offload)
        for _ in range(2):  # the first pass also allocates the workspaces of cuBLAS
            before = torch.cuda.memory_allocated()
            loss = model.model(input_ids=inputs["input_ids"]).last_hidden_state.float().mean()
            after = torch.cuda.memory_allocated()
            loss.backward()
            model.zero_grad()
            del loss
        return after - before

    layers = 8 * 8192 * 512 * 4
    assert kept(offload=False) - kept(offload=True) > 0.7 * layers
