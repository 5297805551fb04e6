"""The chunked loss equals the whole loss; a model that changes its logits is detected."""

import logging
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from hqqtrain.data.sequences import IGNORE_INDEX
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.training.losses import model_loss as module
from hqqtrain.training.losses.model_loss import ChunkedLoss, ModelLoss
from hqqtrain.training.losses.next_token import NextTokenLoss

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "dtype": torch.float32,
}  # fmt: skip


def batch(rows: int = 2, tokens: int = 20) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 96, (rows, tokens))
    labels = ids.clone()
    labels[0, :5] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def reference(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, inputs["labels"][:, 1:].flatten(), reduction="sum")


def make_loss(model: torch.nn.Module, max_tokens: int) -> Callable[..., torch.Tensor]:
    """Return the sum of the next-token loss as a function of a batch; checks the count."""
    model_loss = ModelLoss(model, NextTokenLoss(), SINGLE_PROCESS, max_tokens=max_tokens)

    def loss(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        total, count = model_loss(inputs)
        assert int(count) == int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        return total

    return loss


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Set chunks of 7 tokens and return a list for the number of rows of each call of the head."""
    monkeypatch.setattr(module, "MAX_TRAINING_LOGITS", 7 * 96)
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
    loss = make_loss(model, 2 * 20)
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
    found = make_loss(model, 7)(watched_inputs(model, widths, inputs))
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
        loss = make_loss(model, 40)
    found = [loss(inputs), loss(inputs)]
    assert caplog.text.count("Gemma2ForCausalLM changes the output of its head") == 1
    torch.testing.assert_close(found, [reference(model, inputs)] * 2)


def test_a_model_that_looks_at_its_head_is_chunked(widths: list[int]) -> None:
    """Mamba casts hidden states to the dtype of its head's weight."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=1)
    model, inputs = MambaForCausalLM(config).train(), batch()
    loss = ModelLoss(model, NextTokenLoss(), SINGLE_PROCESS, max_tokens=40)
    assert loss.is_chunked
    torch.testing.assert_close(loss(inputs)[0], reference(model, inputs))


def test_the_head_is_restored(widths: list[int]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    head, names = model.get_output_embeddings(), list(dict(model.named_children()))
    make_loss(model, 40)(batch())
    assert model.get_output_embeddings() is head
    assert list(dict(model.named_children())) == names
    assert model(**batch()).logits.shape == (2, 20, 96)


class DistanceLoss:
    """A loss with a target of its own, which notes the size of each call."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(
        self, hidden: torch.Tensor, head: torch.nn.Module, batch: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.sizes.append(len(hidden))
        loss = (head(hidden) - batch["teacher"]).square().sum()
        return loss, (batch["labels"] >= 0).sum()


def test_chunks_of_any_loss_and_its_gradient():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 5), torch.randn(10, 8, requires_grad=True)
    batch = {"labels": torch.arange(10) - 3, "teacher": torch.randn(10, 5)}
    whole, count = DistanceLoss()(hidden, head, batch)
    loss = DistanceLoss()
    found, found_count = ChunkedLoss(loss, 4)(hidden, head, batch)
    assert loss.sizes == [4, 4, 2]
    torch.testing.assert_close(found, whole)
    assert int(found_count) == int(count) == 7
    ours = torch.autograd.grad(found, [hidden, head.weight])
    for mine, theirs in zip(ours, torch.autograd.grad(whole, [hidden, head.weight]), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert loss.sizes[3:] == [2, 4, 4]  # computed again in the backward pass


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_with_trained_rows_is_chunked(tied: bool, widths: list[int]) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    tokens = {"model.embed_tokens": [3, 90]} | ({} if tied else {"lm_head": [3, 90]})
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    model, inputs = get_peft_model(base, config).train(), batch()
    loss = ModelLoss(model, NextTokenLoss(), SINGLE_PROCESS, max_tokens=40)
    assert loss.is_chunked
    trained = [param for param in model.parameters() if param.requires_grad]
    expected, (found, _) = reference(model, inputs), loss(inputs)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, trained)
    for ours, theirs in zip(torch.autograd.grad(found, trained), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
