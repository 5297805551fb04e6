"""Recomputed layers give the same gradients; with offloading their inputs leave the device."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.training.activation_checkpointing import apply_activation_checkpointing

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "dtype": torch.float32,
}  # fmt: skip


def make_inputs(rows: int = 2, tokens: int = 20) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 96, (rows, tokens))}


def reference(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits.square().mean()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("offload", [True, False])
def test_checkpointed_layers(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are the same; with offloading exactly the layers' inputs are copied."""
    torch.manual_seed(0)
    model, inputs = LlamaForCausalLM(LlamaConfig(**SIZES)).train(), make_inputs()
    wanted = gradients(model, reference(model, inputs))
    moved: list[tuple[int, ...]] = []
    import hqqtrain.training.activation_checkpointing as checkpointing

    def to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        moved.append(tuple(tensor.shape))
        return tensor.device, tensor.clone()

    monkeypatch.setattr(checkpointing, "_to_host", to_host)
    apply_activation_checkpointing(model, offload=offload)
    found = gradients(model, reference(model, inputs))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    layers = [shape for shape in moved if shape != (0,)]  # torch 2.11 adds empty tensors
    assert layers == ([(2, 20, 32)] * 2 if offload else [])


def test_the_output_of_the_embeddings_may_be_changed_in_place() -> None:
    """GIT adds the embeddings of the positions to it."""
    torch.manual_seed(0)
    model, inputs = LlamaForCausalLM(LlamaConfig(**SIZES)).train(), make_inputs()
    apply_activation_checkpointing(model, offload=False)
    embeddings = model.get_input_embeddings().requires_grad_(False)
    embeddings.register_forward_hook(lambda module, inputs, output: output.add_(1.0))
    reference(model, inputs).backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.gpu
def test_offloaded_inputs_leave_the_gpu() -> None:
    config = LlamaConfig(**SIZES | {"hidden_size": 512, "num_hidden_layers": 8})
    peaks = {}
    for offload in (False, True):
        model = LlamaForCausalLM(config).cuda().train().requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_()
        apply_activation_checkpointing(model, offload=offload)
        inputs = {k: v.cuda() for k, v in make_inputs(1, 8192).items()}
        torch.cuda.reset_peak_memory_stats()
        loss = model.model(input_ids=inputs["input_ids"]).last_hidden_state.float().mean()
        kept = torch.cuda.memory_allocated()
        loss.backward()
        peaks[offload] = kept
        del model, loss
    layers = 8 * 8192 * 512 * 4
    assert peaks[False] - peaks[True] > 0.7 * layers
