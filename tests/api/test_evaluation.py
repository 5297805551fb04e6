"""`evaluate` measures each text by itself."""

import pytest
from small_model import small_model
from transformers import AutoModelForCausalLM

import hqqtrain
from hqqtrain.common.errors import UserError


def test_packing_does_not_matter(quantized, tokenizer, text_file):
    results = [
        hqqtrain.evaluate(
            quantized, hqqtrain.load_data(text_file, tokenizer, max_seq_len=2048, packing=packing)
        )
        for packing in (False, True)
    ]
    text = hqqtrain.evaluate(quantized, text_file.read_text(), tokenizer)
    assert results[0].perplexity == pytest.approx(results[1].perplexity)
    assert text.perplexity == pytest.approx(results[0].perplexity)


def test_a_reference(quantized, tokenizer):
    reference = AutoModelForCausalLM.from_pretrained(small_model()).eval()
    result = hqqtrain.evaluate(quantized, ["def f(x): pass"], tokenizer, reference=reference)
    same = hqqtrain.evaluate(reference, ["def f(x): pass"], tokenizer, reference=reference)
    assert result.kl is not None
    assert result.kl > 0
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert result.reference_perplexity == same.perplexity


def test_what_is_refused(quantized, make_model, tokenizer):
    for arguments, message in (
        ({"data": "x = 1"}, "tokenizer=None: texts need"),
        ({"data": "x = 1", "tokenizer": tokenizer, "batch_size": 0}, "batch_size must be"),
    ):
        with pytest.raises(UserError, match=f"^evaluate: {message}"):
            hqqtrain.evaluate(quantized, **arguments)
    with pytest.raises(UserError, match="only 96 embeddings"):
        hqqtrain.evaluate(make_model(), "def function(argument): pass", tokenizer)
