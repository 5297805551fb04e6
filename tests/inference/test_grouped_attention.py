"""Grouped attention is transformers' sdpa, for one token and for several."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hqqtrain.compat import attn_implementation
from hqqtrain.inference.grouped_attention import grouped_attention, use_grouped_attention


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("mask", ["none", "bool", "of heads"])
def test_it_is_sdpa(tokens, mask):
    torch.manual_seed(0)
    query = torch.randn(2, 6, tokens, 8)
    key, value = torch.randn(2, 2, 2, 9, 8)
    masks = {
        "none": None,
        "bool": torch.arange(9).expand(2, 1, tokens, 9) < 7,
        "of heads": torch.randn(2, 6, tokens, 9),
    }
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, False
    arguments = (module, query, key, value, masks[mask])
    expected, _ = sdpa_attention_forward(*arguments, scaling=0.3)
    output, weights = grouped_attention(*arguments, scaling=0.3)
    torch.testing.assert_close(output, expected)
    assert weights is None


def test_a_model_with_another_attention_keeps_it(make_model):
    model = make_model()
    model.set_attn_implementation("eager")
    assert not use_grouped_attention(model)
    assert attn_implementation(model.config) == "eager"
