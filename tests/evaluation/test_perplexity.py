"""Perplexity and KL divergence equal those of a plain computation, in any batch size."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.sequences import TokenSequences, plain_text_targets
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.evaluation.perplexity import EvalResult, _sum_kl, evaluate_perplexity

LENGTHS = np.array([5, 9, 2, 7, 12])


@pytest.fixture
def sequences() -> TokenSequences:
    end = LENGTHS.cumsum()
    starts = end - LENGTHS
    stream = (np.arange(end[-1]) * 7 % 96).astype(np.int32)
    return TokenSequences(stream, plain_text_targets(stream, starts), starts, starts, end)


@torch.no_grad()
def log_probabilities(model: nn.Module, sequences: TokenSequences) -> Tensor:
    """Return the log-probabilities where a target is predicted, one text at a time."""
    rows = []
    for i in range(len(sequences)):
        row = sequences[i]
        logits = model(row["input_ids"][None], use_cache=False).logits[0, :-1]
        rows.append(F.log_softmax(logits.double(), -1)[row["labels"][1:] >= 0])
    return torch.cat(rows)


def labels(sequences: TokenSequences) -> Tensor:
    found = torch.cat([sequences[i]["labels"] for i in range(len(sequences))])
    return found[found >= 0]


def evaluate(model: nn.Module, sequences: TokenSequences, size: int, **more) -> EvalResult:
    return evaluate_perplexity(model, sequences, SINGLE_PROCESS, batch_size=size, **more)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity(make_model, sequences: TokenSequences, batch_size: int):
    model, counts = make_model().train(), []
    found = evaluate(model, sequences, batch_size, on_batch=counts.append)
    expected = F.nll_loss(log_probabilities(model, sequences), labels(sequences))
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert (found.tokens, found.kl, found.reference_perplexity) == (30, None, None)
    assert sum(counts) == 30
    assert model.training


class _AloneOf(Communicator):
    """One of several ranks, the others of which have nothing to add."""

    def all_reduce_sum(self, values: Tensor) -> list[float]:
        return (values + 1).tolist()


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("layout", [BatchLayout(), BatchLayout(packs=False, max_batched_length=7)])
def test_every_rank_counts_all_tokens(make_model, sequences, ranks, batch_size, layout):
    for rank in range(ranks):
        counts, comm = [], _AloneOf(rank, ranks, torch.device("cpu"))
        evaluate_perplexity(
            make_model(), sequences, comm,
            batch_size=batch_size, layout=layout, on_batch=counts.append,
        )  # fmt: skip
        assert sum(counts) == sequences.target_token_count == 30


def test_kl_divergence_to_a_reference(make_model, sequences: TokenSequences):
    model, reference = make_model(), make_model("qwen2")
    found = evaluate(model, sequences, 2, reference=reference)
    log_q, log_p = (log_probabilities(m, sequences) for m in (model, reference))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    nll = F.nll_loss(log_p, labels(sequences))
    assert found.reference_perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(float(agreement), abs=1e-12)
    # Two unrelated models would rarely agree; one that differs a little agrees for some tokens.
    similar = make_model()
    similar.load_state_dict(model.state_dict())
    similar.lm_head.weight.data += (
        torch.randn_like(similar.lm_head.weight) * 0.5 * similar.lm_head.weight.std()
    )
    other = log_probabilities(similar, sequences)
    agreement = float((other.argmax(-1) == log_q.argmax(-1)).double().mean())
    assert 0 < agreement < 1
    found = evaluate(model, sequences, 2, reference=similar)
    assert found.top1_agreement == pytest.approx(agreement, abs=1e-12)
    same = evaluate(model, sequences, 2, reference=model)
    assert (same.kl, same.top1_agreement) == (0, 1)


def test_logits_are_compared_in_slices(make_model, sequences: TokenSequences, monkeypatch):
    model, reference = make_model(), make_model("qwen2")
    whole = evaluate(model, sequences, 5, reference=reference)
    monkeypatch.setattr("hqqtrain.evaluation.perplexity.MAX_EVALUATION_TOKENS", 4)
    sliced = evaluate(model, sequences, 5, reference=reference)
    assert (sliced.perplexity, sliced.kl) == pytest.approx((whole.perplexity, whole.kl), rel=1e-5)


def test_only_targets_are_measured(make_model, sequences: TokenSequences):
    model = make_model()
    some = replace(sequences, targets=sequences.targets & (sequences.stream % 2 == 0))
    found = evaluate(model, some, 2)
    expected = F.nll_loss(log_probabilities(model, some), labels(some))
    assert 0 < found.tokens == some.target_token_count < sequences.target_token_count
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_a_loss_too_large_for_its_exponential_is_infinite():
    assert EvalResult(math.inf, 1).loss == math.inf


def test_the_divergence_has_the_bits_of_pytorch():
    torch.manual_seed(0)
    log_p, log_q = (torch.randn(301, 4096).mul(5).log_softmax(-1) for _ in range(2))
    log_p[0, :5] = -200.0  # exp underflows
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    assert torch.equal(_sum_kl(log_p, log_q), expected)
