"""The full-precision model is called once for each batch, and every figure keeps its bits."""

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hqqtrain.data.sequences import TokenSequences, plain_text_targets
from hqqtrain.distributed.comm import Communicator
from hqqtrain.evaluation import reference
from hqqtrain.evaluation.perplexity import EvalResult, evaluate_perplexity
from hqqtrain.evaluation.reference import ResidentReference
from hqqtrain.models.families.structure import output_head

COMM = Communicator(0, 1, torch.device("cpu"))


def _model(seed: int, kind: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).eval()
    config = Gemma2Config(**sizes, final_logit_softcapping=0.1)
    return Gemma2ForCausalLM(config).to(dtype).eval()


def _sequences() -> TokenSequences:
    stream = np.random.RandomState(0).randint(0, 97, 230).astype(np.int32)
    starts = np.array([0, 33, 101], np.int64)
    begin, end = np.arange(0, 230, 20), np.minimum(np.arange(20, 250, 20), 230)
    return TokenSequences(stream, plain_text_targets(stream, starts), starts, begin, end)


class _Counted:
    """Counts the calls of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, 0
        model.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


def _evaluate(reference: nn.Module, seed: int) -> EvalResult:
    evaluated = _model(seed)
    return evaluate_perplexity(evaluated, _sequences(), COMM, batch_size=5, reference=reference)


def _open(counted: _Counted) -> ResidentReference:
    return ResidentReference(counted.model, output_head(counted.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_called_once_and_the_figures_keep_their_bits(dtype):
    counted = _Counted(_model(0, dtype=dtype))
    expected = [_evaluate(counted.model, seed) for seed in (1, 2)]
    counted.calls = 0
    cached = _open(counted)
    assert [_evaluate(cached, seed) for seed in (1, 2)] == expected
    assert counted.calls == 3
    # A batch that it has not seen needs the model.
    batch = {"input_ids": torch.arange(6)[None], "position_ids": torch.arange(6)[None]}
    assert torch.equal(cached(**batch).logits, _model(0, dtype=dtype)(**batch).logits)
    assert counted.calls == 4


def test_a_model_that_caps_its_logits_is_called_every_time():
    counted = _Counted(_model(0, "gemma2"))
    expected = [_evaluate(counted.model, seed) for seed in (1, 2)]
    counted.calls = 0
    cached = _open(counted)
    assert [_evaluate(cached, seed) for seed in (1, 2)] == expected
    assert counted.calls == 6


def test_hidden_states_that_are_too_large_are_not_kept(monkeypatch):
    monkeypatch.setattr(reference, "MAX_KEPT_BYTES", 10_000)
    counted = _Counted(_model(0))
    cached = _open(counted)
    assert _evaluate(cached, 1) == _evaluate(cached, 1)
    assert counted.calls == 6


def _rank_with_its_batches(rank: int, comm: Communicator) -> None:
    counted, expected = _Counted(_model(0)), []
    for cached in (counted.model, _open(counted)):
        counted.calls = 0
        for seed in (1, 2):
            result = evaluate_perplexity(
                _model(seed), _sequences(), comm, batch_size=5, reference=cached
            )
            expected.append(result)
    assert expected[:2] == expected[2:]
    # Three batches for two ranks: rank 1 repeats the first one, which it does not have yet.
    assert counted.calls == 2


@pytest.mark.ranks
def test_each_rank_keeps_the_outputs_for_its_own_batches():
    assert on_ranks(_rank_with_its_batches, 2) == ["", ""]
