"""The figures of `eval.protocol` are those of the scripts of GPTQ and hqq, on any number of ranks.

The scripts are written again here, with the loss that the model of transformers computes.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.data.layout import BatchLayout
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.evaluation.perplexity import EvalResult, evaluate_perplexity
from hqqtrain.models.source import TINY_FOLDER

ROWS = ["", *(f"def f{i}(x):\n    return x + {i}\n" for i in range(300)), "", "end"]


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    return tokenizer("\n\n".join(ROWS), return_tensors="pt").input_ids


@torch.no_grad()
def gptq_perplexity(model: nn.Module, ids: torch.Tensor, seqlen: int = 2048) -> float:
    """Return the result of `llama_eval` in llama.py of GPTQ."""
    losses = []
    for i in range(ids.numel() // seqlen):
        batch = ids[:, i * seqlen : (i + 1) * seqlen]
        losses.append(model(batch, labels=batch).loss * seqlen)
    return torch.exp(torch.stack(losses).sum() / (len(losses) * seqlen)).item()


@torch.no_grad()
def hqq_perplexity(
    model: nn.Module, ids: torch.Tensor, max_length: int = 1024, stride: int = 512
) -> float:
    """Return the result of `eval_wikitext2` in eval_model.py of hqq."""
    losses = []
    for i in range(0, ids.size(1), stride):
        begin, end = max(i + stride - max_length, 0), min(i + stride, ids.size(1))
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - i)] = -100
        losses.append(model(ids[:, begin:end], labels=labels).loss * (end - i))
    return torch.exp(torch.stack(losses).sum() / end).item()


ORIGINALS = {"wikitext2_2048": gptq_perplexity, "hqq": hqq_perplexity}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return file


def evaluate(source: Path, protocol: str, comm: Communicator, **settings) -> EvalResult:
    evaluation = EvalConfig(
        source=str(source), protocol=protocol, tokens=settings.pop("tokens", 1 << 20)
    )
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    windows = load_eval_set(evaluation, DataConfig(source="other.txt"), tokenizer, 32)
    return evaluate_perplexity(
        make_model(), windows, comm, **{"batch_size": 2, "counts_first": True} | settings
    )


@pytest.mark.parametrize("protocol", ORIGINALS)
@pytest.mark.parametrize("limit", [None, 2560])
def test_the_figures_are_those_of_the_scripts(source, protocol, limit):
    ids = tokens()
    assert 2 * 2048 < ids.numel() < 3 * 2048
    assert ids.numel() % 512 not in (0, 1)
    expected = ORIGINALS[protocol](make_model(), ids[:, :limit])
    assert 100 < expected < 1e6
    found = evaluate(source, protocol, SINGLE_PROCESS, tokens=limit or ids.numel())
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    alone = evaluate(
        source, protocol, SINGLE_PROCESS, tokens=limit or ids.numel(), batch_size=1,
        layout=BatchLayout(packs=False),
    )  # fmt: skip
    assert alone.perplexity == pytest.approx(expected, rel=1e-5)


def test_without_the_first_token_the_mean_is_another_one(source):
    """A test of the test: the first window of hqq counts 512 tokens, of which 511 are predicted."""
    expected = hqq_perplexity(make_model(), tokens())
    found = evaluate(source, "hqq", SINGLE_PROCESS, counts_first=False)
    assert found.perplexity != pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(expected, rel=1e-2)


def _check_ranks(rank: int, comm: Communicator, source: Path, expected: dict[str, float]) -> None:
    for protocol, perplexity in expected.items():
        found = evaluate(source, protocol, comm).perplexity
        assert math.isclose(found, perplexity, rel_tol=1e-6), (found, perplexity)


@pytest.mark.ranks
def test_two_ranks_measure_the_same(source):
    expected = {
        protocol: evaluate(source, protocol, SINGLE_PROCESS).perplexity for protocol in ORIGINALS
    }
    assert on_ranks(_check_ranks, 2, source, expected) == ["", ""]


@pytest.mark.parametrize("protocol", ORIGINALS)
def test_kl_and_agreement_are_measured_on_the_same_tokens(source, protocol):
    model, reference, ids = make_model(), make_model(1), tokens()
    with torch.no_grad():
        reference.lm_head.weight.copy_(model.lm_head.weight)
    found = evaluate(source, protocol, SINGLE_PROCESS, reference=reference)
    assert found.reference_perplexity == pytest.approx(
        ORIGINALS[protocol](reference, ids), rel=1e-5
    )
    assert found.kl > 0
    assert 0 <= found.top1_agreement < 1
    same = evaluate(source, protocol, SINGLE_PROCESS, reference=make_model())
    assert (same.kl, same.top1_agreement) == (0, pytest.approx(1, abs=1e-12))
