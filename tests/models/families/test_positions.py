"""The first position of a text and the length of a table of positions are those of transformers."""

import pytest
import torch
from random_models import random_family

from hqqtrain.models.causal_lm import next_token_outputs
from hqqtrain.models.families.positions import first_position, shortest_position_table


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "llama", "opt"])
def test_positions_start_where_the_model_starts_them(kind):
    """The logits equal those of the model without `position_ids`."""
    options = {"is_decoder": True} if "bert" in kind else {}
    model = random_family(kind, **options)
    tokens = torch.arange(5, 25)[None]
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(20)[None]}
    with torch.no_grad():
        found, _ = next_token_outputs(model, batch)
        expected = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    assert torch.equal(found, expected)
    assert first_position(model) == (model.config.pad_token_id + 1 if "bert" in kind else 0)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("gpt2", {}, ("transformer.wpe", 64)),
        ("gptj", {"rotary_dim": 8}, ("attn.embed_positions", 64)),
        ("bert", {"is_decoder": True}, ("embeddings.position_embeddings", 64)),
        ("roberta", {"is_decoder": True}, ("embeddings.position_embeddings", 63)),
        ("opt", {}, ("decoder.embed_positions", 64)),
    ],
)
def test_the_table_of_positions_has_its_name_and_length(kind, options, expected):
    name, length = shortest_position_table(random_family(kind, **options)) or ("", 0)
    assert (name.endswith(expected[0].partition(".")[2]), length) == (True, expected[1])


def test_computed_positions_have_no_table():
    assert shortest_position_table(random_family("llama")) is None
