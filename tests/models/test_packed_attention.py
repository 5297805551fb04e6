"""Documents that share rows have the loss and the gradients that each of them has alone."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from architectures import IN_ROWS, PACKED, SMALL, small_config, small_model
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from hqqtrain.data.layout import PACKED as PACKS
from hqqtrain.data.layout import Batch, batch_on_device
from hqqtrain.data.sequences import TokenSequences, plain_text_targets
from hqqtrain.models import packed_attention
from hqqtrain.models.build import build_meta
from hqqtrain.models.causal_lm import model_inputs, next_token_outputs
from hqqtrain.models.packed_attention import (
    NAME,
    Documents,
    find_obstacle,
    use_packed_attention,
    varlen_attention,
)
from hqqtrain.training.activation_checkpointing import apply_activation_checkpointing

FAMILIES: dict[str, dict[str, Any]] = PACKED | {
    "qwen2": SMALL | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": SMALL | {"head_dim": 16},
    "gemma": SMALL | {"head_dim": 16},
    "phi3": SMALL,
}
MASKED = ("falcon", "falcon_alibi")
"""Models with an attention of their own."""


def packed(lengths: Sequence[int], tokens: int, rows: int, last: int | None = None) -> Batch:
    """Return a batch of random documents.

    Args:
        lengths: The lengths of the documents in the stream, which are repeated.
        tokens: Tokens of a row.
        rows: Number of rows.
        last: Tokens of the last row, which is padded; None: all.
    """
    size = tokens * rows
    lengths = list(lengths) * (size // sum(lengths) + 1)
    starts = np.cumsum([0, *lengths])
    stream = np.random.default_rng(0).integers(2, 500, starts[-1]).astype(np.int32)
    begin = np.arange(rows) * tokens
    end = begin + tokens
    end[-1] = begin[-1] + (last or tokens)
    targets = plain_text_targets(stream, starts[:-1])
    return batch_on_device(TokenSequences(stream, targets, starts[:-1], begin, end), PACKS, "cpu")


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    logits, labels = next_token_outputs(model, batch)
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def gradients(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, list[Tensor]]:
    """Return the sum of the losses of all batches, and the gradients of all parameters."""
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
    return sum(losses), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def alone(batch: Batch) -> list[Batch]:
    """Return each document of a batch as a batch of its own, without those of one token."""
    lengths = batch["document_lengths"].tolist()
    parts = {name: batch[name].flatten().split(lengths) for name in ("input_ids", "labels")}
    pairs = zip(parts["input_ids"], parts["labels"], strict=True)
    return [{"input_ids": i[None], "labels": t[None]} for i, t in pairs if len(i) > 1]


def assert_equal(found: tuple[float, list[Tensor]], wanted: tuple[float, list[Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


def trained_model(name: str = "llama", **settings: Any) -> Any:
    model = small_model(small_config(name, FAMILIES.get(name, SMALL) | settings))
    return model.train().requires_grad_(True)


def test_the_lengths_of_documents() -> None:
    batch = packed((3, 1, 1, 7), tokens=10, rows=3, last=4)
    assert batch["document_lengths"].tolist() == [3, 1, 1, 5, 2, 3, 1, 1, 3, 10]
    assert batch["position_ids"][2].tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MASKED])
def test_equals_the_path_with_a_mask(name: str, rows: int) -> None:
    model, batch = trained_model(name), packed((5, 40, 1, 1, 13, 2, 30, 9), 48, rows, last=31)
    wanted = gradients(model, [batch])
    assert use_packed_attention(model) == ""
    assert "documents" in model_inputs(model, batch)
    assert_equal(gradients(model, [batch]), wanted)


@pytest.mark.parametrize(("tokens", "rows"), [(2048, 2), (32768, 1)])
def test_equals_each_document_alone(tokens: int, rows: int) -> None:
    lengths = [int(n) for n in np.random.default_rng(1).lognormal(5.7, 0.8, 40).clip(1, 1500)]
    model = trained_model(num_hidden_layers=1 if tokens > 2048 else 2, vocab_size=512)
    batch = packed([*lengths, 1, 1], tokens, rows)
    wanted = gradients(model, alone(batch))
    use_packed_attention(model)
    assert_equal(gradients(model, [batch]), wanted)


@pytest.mark.parametrize("offload", [True, False])
def test_recomputed_layers_get_the_same_documents(offload: bool) -> None:
    model, batch = trained_model(), packed((5, 40, 1, 13), 48, 2)
    use_packed_attention(model)
    wanted = gradients(model, [batch])
    apply_activation_checkpointing(model, offload=offload)
    assert_equal(gradients(model, [batch]), wanted)


def test_no_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one text each are computed as without documents, to the bit."""
    model, batch = trained_model(), packed((48,), 48, 3)
    wanted = loss_of(model, batch)
    use_packed_attention(model)

    def refuse(**_: Any) -> None:
        raise AssertionError("a mask is built")

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, NAME, refuse)
    assert torch.equal(loss_of(model, batch), wanted)
    loss_of(model, packed((5, 40, 1, 13), 48, 2))
    with pytest.raises(AssertionError, match="a mask is built"):
        model(batch["input_ids"], position_ids=batch["position_ids"] % 7, use_cache=False)


def test_calls_without_documents_are_those_of_sdpa() -> None:
    model, batch = trained_model().eval(), packed((5, 40, 1, 13), 48, 2)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :9] = 0
    calls: list[dict[str, Any]] = [
        {"position_ids": batch["position_ids"], "use_cache": False},
        {"attention_mask": mask},
    ]
    wanted = [model(batch["input_ids"], **call).logits for call in calls]
    use_packed_attention(model)
    for call, logits in zip(calls, wanted, strict=True):
        assert torch.equal(model(batch["input_ids"], **call).logits, logits)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("falcon", PACKED["falcon"], "has an attention of its own"),
        ("llama", SMALL | {"attention_dropout": 0.1}, "needs attention dropout"),
        ("stablelm", SMALL, "does not pass documents to its layers"),
        ("gpt_oss", IN_ROWS["gpt_oss"], "uses attn_implementation=eager"),
    ],
)
def test_models_that_keep_their_mask(name: str, settings: dict, reason: str) -> None:
    model = build_meta(small_config(name, settings))
    assert use_packed_attention(model) == reason == find_obstacle(model)
    assert model.config._attn_implementation != NAME


def test_a_model_without_a_small_copy_keeps_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "small_copies", lambda *_: iter(()))
    assert "no small copy" in find_obstacle(build_meta(small_config("llama", SMALL)))


def kernel_inputs(dtype: torch.dtype, rows: int, tokens: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(rows, tokens, heads, width, device="cuda", dtype=dtype).transpose(1, 2)
        .detach().requires_grad_()
        for heads in (8, 2, 2)
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_on_a_gpu(dtype: torch.dtype, width: int, window: int | None) -> None:
    """It is as close to fp32 as the attention of each document by itself in the same dtype."""
    lengths = torch.tensor([5, 300, 1, 1, 717, 1024, 512, 512, 1000, 24])
    documents = Documents.from_lengths(lengths, torch.device("cuda"))
    inputs = kernel_inputs(dtype, 2, 2048, width)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    results = []
    for each in (inputs, wide):
        output, _ = varlen_attention(
            nn.Module(), *each, None, documents=documents, sliding_window=window
        )
        output.float().square().sum().backward()
        results.append([output.detach().float(), *(x.grad.float() for x in each)])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 4e-3
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= tolerance * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "rows"), [(2048, 1), (2048, 4), (32768, 1)])
@pytest.mark.parametrize("recomputes", [True, False])
def test_training_on_a_gpu(tokens: int, rows: int, recomputes: bool) -> None:
    """Loss and gradients are as close to those in fp32 as those of each document alone."""
    lengths = [int(n) for n in np.random.default_rng(1).lognormal(5.7, 0.8, 40).clip(1, 1500)]
    batch = packed([*lengths, 1, 1], tokens, rows)
    cuda = {k: v if k == "document_lengths" else v.cuda() for k, v in batch.items()}
    exact = gradients(trained_model(head_dim=64).cuda(), alone(cuda))
    model = trained_model(head_dim=64).cuda().bfloat16()
    wanted = gradients(model, alone(cuda))
    assert use_packed_attention(model) == ""
    if recomputes:
        apply_activation_checkpointing(model, offload=False)
    found = gradients(model, [cuda])
    assert found[0] == pytest.approx(exact[0], rel=3e-3)
    for ours, theirs, right in zip(found[1], wanted[1], exact[1], strict=True):
        assert (ours - right).norm() <= 1.5 * (theirs - right).norm() + 2e-2 * right.norm()


@pytest.mark.gpu
def test_no_synchronization_on_a_gpu() -> None:
    """The host waits for the device neither for a mask nor for the longest document."""
    batch = packed((5, 40, 1, 13), 48, 2)
    cuda = {k: v if k == "document_lengths" else v.cuda() for k, v in batch.items()}
    model = trained_model().cuda().bfloat16()
    use_packed_attention(model)
    loss_of(model, cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next_token_outputs(model, cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_is_registered_under_its_name() -> None:
    assert use_packed_attention(trained_model()) == ""
    assert AttentionInterface()[NAME] is varlen_attention
