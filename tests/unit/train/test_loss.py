"""The loss in parts is the loss; a model that does more to its logits is seen through."""

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hqqtrain.train import loss as module
from hqqtrain.train.checkpointing import checkpoint_layers
from hqqtrain.train.loss import NextTokenLoss

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
    """Parts of 7 tokens; how many rows the head was given, each time."""
    monkeypatch.setattr(module, "LOGITS", 7 * 96)
    return []


def watched(model: torch.nn.Module, widths: list[int]) -> torch.nn.Module:
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: widths.append(inputs[0].flatten(0, -2).shape[0])
    )
    return model.train()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_in_parts(widths: list[int]) -> None:
    torch.manual_seed(0)
    model, inputs = LlamaForCausalLM(LlamaConfig(**SIZES)), batch()
    expected = reference(model, inputs)
    wanted = gradients(model, expected)
    loss = NextTokenLoss(watched(model, widths))
    found = loss(inputs)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(model, found), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    tried = 2 * 8, 2 * 7, 2 * 20  # as ever, the head alone, and the head letting through
    assert sorted(set(widths)) == [3, 7, *sorted(tried)]
    again = len(widths)
    torch.testing.assert_close(loss(batch()).isfinite(), torch.tensor(True))
    assert 16 not in widths[again:], "tried once"


def test_few_logits_are_held_at_once(widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", 2 * 19 * 96)
    torch.manual_seed(0)
    model, inputs = LlamaForCausalLM(LlamaConfig(**SIZES)), batch()
    found = NextTokenLoss(watched(model, widths))(inputs)
    assert widths == [40]
    torch.testing.assert_close(found, reference(model, inputs))


def test_capped_logits_are_not_taken_apart(
    widths: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, final_logit_softcapping=0.05)
    model, inputs = Gemma2ForCausalLM(config), batch()
    loss = NextTokenLoss(watched(model, widths))
    with caplog.at_level(logging.WARNING):
        found = [loss(inputs), loss(inputs)]
    assert caplog.text.count("Gemma2ForCausalLM does more to logits than its head") == 1
    torch.testing.assert_close(found, [reference(model, inputs)] * 2)


def test_the_head_is_as_before(widths: list[int]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    NextTokenLoss(model)(batch())
    assert "forward" not in vars(model.get_output_embeddings())
    assert model(**batch()).logits.shape == (2, 20, 96)


@pytest.mark.parametrize("offload", [True, False])
def test_checkpointed_layers(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients; offloaded, exactly the inputs of layers are handed over."""
    torch.manual_seed(0)
    model, inputs = LlamaForCausalLM(LlamaConfig(**SIZES)).train(), batch()
    wanted = gradients(model, reference(model, inputs))
    moved: list[tuple[int, ...]] = []
    import hqqtrain.train.checkpointing as checkpointing

    to_host = checkpointing._to_host
    monkeypatch.setattr(
        checkpointing, "_to_host", lambda t: moved.append(tuple(t.shape)) or to_host(t)
    )
    checkpoint_layers(model, offload=offload)
    found = gradients(model, reference(model, inputs))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    layers = [shape for shape in moved if shape != (0,)]  # which torch 2.11 adds
    assert layers == ([(2, 20, 32)] * 2 if offload else [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_inputs_leave_the_gpu() -> None:
    config = LlamaConfig(**SIZES | {"hidden_size": 512, "num_hidden_layers": 8})
    peaks = {}
    for offload in (False, True):
        model = LlamaForCausalLM(config).cuda().train().requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_()
        checkpoint_layers(model, offload=offload)
        inputs = {k: v.cuda() for k, v in batch(1, 8192).items()}
        torch.cuda.reset_peak_memory_stats()
        loss = model.model(input_ids=inputs["input_ids"]).last_hidden_state.float().mean()
        kept = torch.cuda.memory_allocated()
        loss.backward()
        peaks[offload] = kept
        del model, loss
    layers = 8 * 8192 * 512 * 4
    assert peaks[False] - peaks[True] > 0.7 * layers
