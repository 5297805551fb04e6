"""A prepared model generates the same text, with a growing and with a static cache."""

import pytest
import torch
from exports import TOKENS

from hqqtrain.inference.prepare import prepare_for_inference


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_generates_the_same_tokens(make_trained, cache):
    trained = make_trained(nbits=4)

    def generate() -> torch.Tensor:
        return trained.model.generate(
            input_ids=TOKENS, max_new_tokens=12, do_sample=False, cache_implementation=cache,
            disable_compile=True,
        )  # fmt: skip

    before = generate()
    prepared = prepare_for_inference(trained.model.train())
    assert prepared is trained.model
    assert not prepared.training
    assert torch.equal(generate(), before)
