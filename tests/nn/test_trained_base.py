"""Parts of the base that are trained are selected as PEFT selects them, or refused with the fix."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.nn.lora import cast_adapters, lora_config
from hqqtrain.nn.replace import quantize_model
from hqqtrain.nn.trained_base import modules_to_save, set_tie_flag, trained_tokens

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def _model(*, skip: tuple[str, ...] = ("lm_head",), **config: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **config))
    quantize_model(model, QuantConfig(group_size=None, solver="rtn", skip=list(skip)))
    return model


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["norm"], ["model.norm"]),
        (["lm_head", "norm"], ["model.norm", "lm_head"]),
        (
            ["*.input_layernorm"],
            ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"],
        ),
    ],
)
def test_exactly_the_selected_modules_are_trained(patterns, expected):
    model = _model()
    assert modules_to_save(patterns, model) == expected
    peft = get_peft_model(model, lora_config(AdapterConfig(modules_to_save=patterns), model))
    names = [n for n, p in peft.named_parameters() if p.requires_grad and ".lora_" not in n]
    assert names == [f"base_model.model.{name}.modules_to_save.default.weight" for name in expected]


@pytest.mark.parametrize(
    ("pattern", "tied", "message"),
    [
        ("nrom", False, "=nrom: matches no module with parameters. Did you mean 'norm'"),
        ("model", False, "=model: matches no module with parameters"),
        ("q_proj", False, "self_attn.q_proj is quantized.*quant.skip=\\[lm_head,q_proj\\]"),
        ("lm_head", True, "lm_head is tied.*data.add_tokens"),
        ("embed_tokens", True, "embed_tokens is tied"),
    ],
)
def test_a_module_that_cannot_be_trained_is_refused(pattern, tied, message):
    with pytest.raises(UserError, match=f"adapter.modules_to_save.*{message}"):
        modules_to_save([pattern], _model(tie_word_embeddings=tied))


def test_a_name_that_peft_would_also_find_elsewhere_is_refused():
    model = _model()
    model.norm = nn.LayerNorm(4)  # PEFT takes every module whose name ends in "norm"
    with pytest.raises(UserError, match=r"PEFT would also train model\.layers\.0\.input_layernorm"):
        modules_to_save(["norm"], model)


def test_the_rows_of_a_quantized_head_or_one_with_a_bias_are_refused():
    with pytest.raises(UserError, match="lm_head is quantized"):
        trained_tokens(_model(skip=()), [1], [])
    tied = _model(tie_word_embeddings=True)
    tied.lm_head.bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(UserError, match=r"more than a weight; set data\.add_tokens=null"):
        trained_tokens(tied, [1], [])
    model = _model()
    model.lm_head = nn.Linear(16, 32)
    with pytest.raises(UserError, match="modules_to_save=\\[lm_head\\]"):
        trained_tokens(model, [1], [])
    assert trained_tokens(model, [1], ["lm_head"]) == {"model.embed_tokens": [1]}


def test_modules_in_fp32_compute_in_the_dtype_of_the_model():
    model = _model().bfloat16()
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    adapter = AdapterConfig(modules_to_save=["norm", "lm_head", "input_layernorm"])
    peft = get_peft_model(model, lora_config(adapter, model, [3]))
    cast_adapters(peft, torch.float32)
    trained = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    assert {param.dtype for param in trained.values()} == {torch.float32}
    logits = peft(ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.02)
    logits.float().sum().backward()
    assert all(param.grad is not None for param in trained.values())


@pytest.mark.parametrize("tied", [True, False])
def test_the_configuration_says_whether_the_head_is_tied(tied):
    model = _model(tie_word_embeddings=tied)
    model.config.tie_word_embeddings = not tied
    set_tie_flag(model)
    assert model.config.tie_word_embeddings is tied
