"""A cache whose layers share one count holds what transformers' own cache holds."""

import pytest
import torch
from random_models import random_family
from transformers import StaticCache

from hqqtrain.generation.static_cache import static_cache


@torch.no_grad()
def test_keys_and_logits_are_those_of_transformers_own_cache():
    model = random_family("llama")
    tokens = torch.randint(0, 90, (1, 9))
    theirs = StaticCache(config=model.config, max_cache_len=12)
    position = torch.zeros((), dtype=torch.long)
    ours = static_cache(model.config, 12, position)
    for part in tokens.split([5, 1, 1, 2], dim=1):
        positions = position + torch.arange(part.shape[1])[None]
        expected = model(part, position_ids=positions, past_key_values=theirs).logits
        logits = model(part, position_ids=positions, past_key_values=ours).logits
        position += part.shape[1]
        assert torch.equal(logits, expected)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)
    ours.reset()
    assert position == 0


def test_other_caches_are_refused():
    config = random_family("mistral", sliding_window=8).config
    with pytest.raises(NotImplementedError, match="its cache is transformers' StaticSliding"):
        static_cache(config, 12, torch.zeros((), dtype=torch.long))
