"""Outputs and labels are aligned as transformers' own loss aligns them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from hqqtrain.common.errors import UserError
from hqqtrain.models.causal_lm import next_token_outputs


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 2), (3, 7)])
def test_the_loss_is_that_of_transformers(make_model, sequences, tokens):
    model = make_model()
    ids = torch.randint(0, 96, (sequences, tokens))
    labels = ids.clone()
    labels[0, 1:2] = -100 if tokens > 2 else labels[0, 1]
    batch = {"input_ids": ids, "labels": labels}
    logits, next_labels = next_token_outputs(model, batch)
    assert logits.shape == (sequences * (tokens - 1), 96)
    loss = torch.nn.functional.cross_entropy(logits, next_labels, ignore_index=-100)
    torch.testing.assert_close(loss, model(**batch).loss)


def test_the_other_entries_of_a_batch_are_arguments(make_model):
    """With the positions of two packed sequences, the second one does not see the first."""
    model, ids = make_model(), torch.randint(0, 96, (1, 6))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids}
    packed, _ = next_token_outputs(model, batch)
    alone, _ = next_token_outputs(model, {"input_ids": ids[:, 3:], "labels": ids[:, 3:]})
    torch.testing.assert_close(packed[3:], alone)


def test_an_error_in_the_code_of_a_model_names_the_model(make_model):
    """Experts per token may be null in a configuration; transformers notices it when called."""
    settings = {"num_experts_per_tok": 2, "num_local_experts": 4, "vocab_size": 96}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(MixtralConfig(**settings | sizes))
    model.model.layers[0].mlp.gate.top_k = None
    ids = torch.zeros((1, 3), dtype=torch.long)
    with pytest.raises(UserError, match=r"MixtralForCausalLM .*\(TypeError: topk"):
        next_token_outputs(model, {"input_ids": ids, "labels": ids})


def test_errors_of_other_code_pass(make_model):
    model, ids = make_model(), torch.zeros((1, 3), dtype=torch.long)
    model.model.layers[0].mlp.forward = lambda _: [][1]
    with pytest.raises(IndexError, match="list index"):
        next_token_outputs(model, {"input_ids": ids, "labels": ids})
