"""The figures of a text do not depend on what was evaluated before it, nor on the batch size."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.sequences import TokenSequences, plain_text_targets
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.evaluation.perplexity import EvalResult, evaluate_perplexity
from hqqtrain.evaluation.reference import ResidentReference
from hqqtrain.models.families.structure import output_head
from hqqtrain.models.rope import max_batched_length, reset_dynamic_rope

ORIGINAL_LENGTH = 16  # tokens; longer texts have other frequencies
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8, "original_max_position_embeddings": ORIGINAL_LENGTH,
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "dynamic": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, max_position_embeddings=ORIGINAL_LENGTH, rope_parameters=DYNAMIC)
    ),
    "longrope": lambda: Phi3ForCausalLM(
        Phi3Config(**SIZES, max_position_embeddings=64, rope_parameters=LONG)
    ),
    "sliding": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, head_dim=16, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "recurrent": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
}  # fmt: skip


def _model(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    reset_dynamic_rope(model)
    return model


def _texts(seed: int, lengths: list[int]) -> TokenSequences:
    stream = np.random.RandomState(seed).randint(1, 97, sum(lengths)).astype(np.int32)
    end = np.cumsum(lengths)
    starts = end - lengths
    return TokenSequences(stream, plain_text_targets(stream, starts), starts, starts, end)


SHORT = _texts(0, [20, 24, 18])
LONGER = _texts(1, [40, 7, 33])


def _evaluate(
    model: nn.Module, name: str, texts: TokenSequences, batch_size: int, reference: nn.Module
) -> EvalResult:
    layout = BatchLayout(packs=name != "recurrent", max_batched_length=max_batched_length(model))
    return evaluate_perplexity(
        model, texts, SINGLE_PROCESS, batch_size=batch_size, reference=reference, layout=layout
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_whatever_was_evaluated_before(name):
    model, reference, alone = _model(name, 0), _model(name, 1), _model(name, 1)
    cached = ResidentReference(reference, output_head(reference))
    first = _evaluate(model, name, SHORT, 2, cached)
    other = _evaluate(model, name, LONGER, 2, cached)
    torch.manual_seed(5), random.seed(5)
    assert _evaluate(model, name, SHORT, 2, cached) == first
    assert _evaluate(model, name, LONGER, 2, cached) == other
    # Nor does the order of the texts, or a reference that keeps its outputs, change anything.
    fresh = _model(name, 0)
    assert _evaluate(fresh, name, LONGER, 2, alone) == other
    assert _evaluate(fresh, name, SHORT, 2, alone) == first


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_size_changes_the_rounding_alone(name):
    model, reference = _model(name, 0), _model(name, 1)
    texts = _texts(2, [40, 9, 14, 33, 5, 16])
    one, *more = (_evaluate(model, name, texts, size, reference) for size in (1, 2, 4, 6))
    for result in more:
        assert result.tokens == one.tokens
        assert result.perplexity == pytest.approx(one.perplexity, rel=1e-5)
        assert result.kl == pytest.approx(one.kl, rel=1e-4)
        assert result.top1_agreement == pytest.approx(one.top1_agreement, abs=1e-9)


def test_a_model_that_remembers_the_longest_text_would_be_found():
    """The control: without `reset_dynamic_rope`, the figures depend on the texts before."""
    torch.manual_seed(0)
    model, reference = MODELS["dynamic"]().eval(), _model("dynamic", 1)
    first = _evaluate(model, "dynamic", SHORT, 1, reference)
    _evaluate(model, "dynamic", LONGER, 1, reference)
    assert _evaluate(model, "dynamic", SHORT, 1, reference) != first
