"""The chunked loss equals the whole loss; a model that changes its logits is detected."""

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.train.activation_checkpointing import apply_activation_checkpointing
from hqqtrain.train.losses import next_token as module
from hqqtrain.train.losses.next_token import NextTokenLoss

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "dtype": torch.float32,
}  # fmt: skip


def batch(rows: int = 2, tokens: int = 20) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 96, (rows, tokens))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def reference(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, inputs["labels"][:, 1:].flatten(), reduction="sum")


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Set chunks of 7 tokens and return a list for the number of rows of each call of the head."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 7 * 96)
    return []


def watched_inputs(
    model: torch.nn.Module, widths: list[int], inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return `inputs` after adding a hook that appends the rows of the head's input to `widths`."""
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: widths.append(given[0].flatten(0, -2).shape[0])
    )
    model.train()
    return inputs


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_chunks(widths: list[int]) -> None:
    torch.manual_seed(0)
    model, inputs = LlamaForCausalLM(LlamaConfig(**SIZES)), batch()
    expected = reference(model, inputs)
    wanted = gradients(model, expected)
    loss = NextTokenLoss(model, 2 * 20, SINGLE_PROCESS)
    found = loss(watched_inputs(model, widths, inputs))
    torch.testing.assert_close(found, expected)
    assert [width for width in widths if width != 40] == [7] * 5 + [3]
    for ours, theirs in zip(gradients(model, found), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    short = batch(1, 6)
    torch.testing.assert_close(loss(short), reference(model, short))


def test_one_chunk_runs_the_head_once(widths: list[int]) -> None:
    torch.manual_seed(0)
    model, inputs = LlamaForCausalLM(LlamaConfig(**SIZES)), batch(1, 7)
    found = NextTokenLoss(model, 7, SINGLE_PROCESS)(watched_inputs(model, widths, inputs))
    assert widths == [7]
    torch.testing.assert_close(found, reference(model, inputs))


@pytest.mark.parametrize("cap", [0.05, 30.0, 1000.0])
def test_capped_logits_are_not_chunked(
    cap: float, widths: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=cap)).train()
    inputs = batch()
    with caplog.at_level(logging.WARNING):
        loss = NextTokenLoss(model, 40, SINGLE_PROCESS)
    found = [loss(inputs), loss(inputs)]
    assert caplog.text.count("Gemma2ForCausalLM changes the output of its head") == 1
    torch.testing.assert_close(found, [reference(model, inputs)] * 2)


def test_the_head_is_restored(widths: list[int]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    NextTokenLoss(model, 40, SINGLE_PROCESS)(batch())
    assert "forward" not in vars(model.get_output_embeddings())
    assert model(**batch()).logits.shape == (2, 20, 96)


@pytest.mark.parametrize("offload", [True, False])
def test_checkpointed_layers(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are the same; with offloading exactly the layers' inputs are copied."""
    torch.manual_seed(0)
    model, inputs = LlamaForCausalLM(LlamaConfig(**SIZES)).train(), batch()
    wanted = gradients(model, reference(model, inputs))
    moved: list[tuple[int, ...]] = []
    import hqqtrain.train.activation_checkpointing as checkpointing

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_inputs_leave_the_gpu() -> None:
    config = LlamaConfig(**SIZES | {"hidden_size": 512, "num_hidden_layers": 8})
    peaks = {}
    for offload in (False, True):
        model = LlamaForCausalLM(config).cuda().train().requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_()
        apply_activation_checkpointing(model, offload=offload)
        inputs = {k: v.cuda() for k, v in batch(1, 8192).items()}
        torch.cuda.reset_peak_memory_stats()
        loss = model.model(input_ids=inputs["input_ids"]).last_hidden_state.float().mean()
        kept = torch.cuda.memory_allocated()
        loss.backward()
        peaks[offload] = kept
        del model, loss
    layers = 8 * 8192 * 512 * 4
    assert peaks[False] - peaks[True] > 0.7 * layers
