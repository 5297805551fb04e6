"""The selection of linears to replace, and every way to select none by mistake."""

import logging
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
)

from hqqtrain.common.errors import UserError
from hqqtrain.config.quant import QuantConfig
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.replace import dequantize_linears, fused_experts, quantize_model
from hqqtrain.quant.error import relative_error
from hqqtrain.quant.spec import QuantSpec

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def llama(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**(SMALL | changes)))


def packed(model: nn.Module) -> dict[str, HQQLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, HQQLinear)}


def test_replaces_all_but_the_head_and_reports_it() -> None:
    model, ids = llama(), torch.arange(32)[None]
    total = sum(p.numel() for p in model.parameters())
    dense = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = quantize_model(model, QuantConfig(nbits=8, group_size=16))
    layers = packed(model)
    assert list(report.quantized) == list(layers)
    assert len(layers) == 14
    assert report.skipped == ["lm_head"]
    assert report.num_quantized_weights == sum(
        m.in_features * m.out_features for m in layers.values()
    )
    assert report.num_parameters == total
    assert report.share == report.num_quantized_weights / total
    assert repr(report).startswith("QuantizationReport(quantized=14 layers (14 of 8 bits), dense=0")
    for name, layer in layers.items():
        assert relative_error(dense[name], layer.dequantize()) < 1e-4
    assert model(ids).logits.isfinite().all()


def test_on_meta_it_only_builds() -> None:
    with torch.device("meta"):
        model = llama()
    report = quantize_model(model, QuantConfig(nbits=2))
    assert len(report.quantized) == 14
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("pattern", ["*.q_proj", "self_attn.q_proj", "model.layers.?.*.q_proj"])
def test_overrides_by_glob_and_by_tag(pattern: str) -> None:
    overrides = {"*.mlp.*": {"nbits": 3}, pattern: {"nbits": 8, "group_size": None}}
    report = quantize_model(llama(), QuantConfig(nbits=2, overrides=overrides))
    assert report.quantized["model.layers.1.self_attn.q_proj"] == QuantSpec(
        8, None, 1, "hqq", torch.float32
    )
    assert report.quantized["model.layers.1.mlp.up_proj"].nbits == 3
    assert report.quantized["model.layers.1.self_attn.k_proj"].nbits == 2


def test_null_and_skip_leave_in_full_precision() -> None:
    model = llama()
    config = QuantConfig(skip=["lm_head", "mlp.down_proj"], overrides={"*.0.*.k_proj": None})
    report = quantize_model(model, config)
    out = {"lm_head", "model.layers.0.self_attn.k_proj"}
    out |= {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert set(report.skipped) == out
    assert all(type(model.get_submodule(name)) is nn.Linear for name in out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": ["lm_haed"]}, r"quant\.skip=lm_haed: matches no .*Did you mean 'lm_head'"),
        ({"skip": ["*.q_prj"]}, r"quant\.skip=\*\.q_prj"),
        (
            {"overrides": {"attn.q_proj": {"nbits": 4}}},
            r"overrides=attn\.q_proj.*self_attn\.q_proj",
        ),
        ({"group_size": 48}, r"group_size=48.*in_features=64 of model\.layers\.0"),
        ({"overrides": {"*.down_proj": {"group_size": 96}}}, r"group_size=96.*down_proj"),
        ({"skip": ["*"]}, r"no nn\.Linear to quantize"),
        (
            {"skip": ["lm_head", "*.q_proj"], "overrides": {"self_attn.q_proj": {"nbits": 8}}},
            r"overrides=self_attn\.q_proj: has no effect.*with quant\.skip='\[lm_head\]'\.",
        ),
    ],
)
def test_patterns_that_select_nothing_are_refused(settings: dict, message: str) -> None:
    model = llama()
    with pytest.raises(UserError, match=message):
        quantize_model(model, QuantConfig(**settings))
    assert not packed(model)


def test_the_default_skip_may_match_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    assert list(quantize_model(model, QuantConfig()).quantized) == ["0"]


def test_a_model_without_linears() -> None:
    with pytest.raises(UserError, match=r"Sequential.*no nn\.Linear"):
        quantize_model(nn.Sequential(nn.Conv1d(2, 2, 1)), QuantConfig())


def mixtral() -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=4))


def test_fused_experts_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"model\.layers\.0\.\S*experts\.\S*: \[4, "):
        quantize_model(mixtral(), QuantConfig())


def test_the_advice_for_fused_experts_keeps_them_in_full_precision() -> None:
    model = mixtral()
    with pytest.raises(UserError, match=r"quant\.skip='\[lm_head,\"\*\.experts\"\]'"):
        quantize_model(model, QuantConfig())
    report = quantize_model(model, QuantConfig(skip=["lm_head", "*.experts"]))
    assert list(packed(model)) == list(report.quantized)
    assert len(report.quantized) == 8
    assert report.skipped == ["lm_head"]
    assert model.model.layers[0].mlp.experts.down_proj.shape == (4, 64, 128)


def test_the_advice_for_fused_experts_keeps_the_other_patterns() -> None:
    skip = ["lm_head", "*.k_proj"]
    with pytest.raises(UserError, match=r"\[lm_head,\"\*\.k_proj\",\"\*\.experts\"\]'"):
        quantize_model(mixtral(), QuantConfig(skip=skip))


def test_a_pattern_for_experts_needs_experts() -> None:
    with pytest.raises(UserError, match=r"quant\.skip=\*\.experts: matches no linear layer"):
        quantize_model(llama(), QuantConfig(skip=["*.experts"]))


def test_fused_experts_are_recognized_by_their_class() -> None:
    """The parameters of JetMoE's MLPs have no telling names; those of Mamba's Conv1d are 3-D."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    config = JetMoeConfig(**sizes, num_key_value_heads=2, kv_channels=8, num_local_experts=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert "model.layers.0.mlp.input_linear.weight" in fused_experts(model)
    assert fused_experts(nn.ModuleDict({"experts_of_none": nn.Linear(2, 2)})) == {}
    assert fused_experts(nn.Sequential(nn.Conv1d(2, 2, 3))) == {}


def test_a_small_quantized_share_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hqqtrain"):
        quantize_model(llama(), QuantConfig())
        assert not caplog.records
        report = quantize_model(llama(vocab_size=4096), QuantConfig())
    assert report.share < 0.3
    assert f"{100 * report.share:.0f} % of the weights" in caplog.text


def test_a_bad_weight_is_named() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[7, 0] = float("inf")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj.*row 7 holds inf"):
        quantize_model(model, QuantConfig())


def test_the_head_is_known_under_any_name() -> None:
    """GPT-NeoX's head is `embed_out` on older transformers; BERT's is inside of its predictions."""
    torch.manual_seed(0)
    config = BertConfig(**(SMALL | {"is_decoder": True}))
    model = AutoModelForCausalLM.from_config(config)
    report = quantize_model(model, QuantConfig(nbits=8, group_size=16))
    assert report.skipped == ["cls.predictions.decoder"]
    asked_for = AutoModelForCausalLM.from_config(config)
    report = quantize_model(asked_for, QuantConfig(nbits=8, group_size=16, skip=[]))
    assert "cls.predictions.decoder" in report.quantized


def test_conv1d_is_named() -> None:
    config = GPT2Config(vocab_size=32, n_embd=64, n_layer=1, n_head=2)
    with pytest.raises(UserError, match=r"such as transformer\.h\.0\.attn\.c_attn, are .*Conv1D"):
        quantize_model(AutoModelForCausalLM.from_config(config), QuantConfig())


def test_the_advice_for_several_kinds_of_experts_is_accepted() -> None:
    config = JetMoeConfig(**(SMALL | {"num_local_experts": 2, "kv_channels": 16}))
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="fused mixture-of-experts") as caught:
        quantize_model(model, QuantConfig(group_size=16))
    patterns = re.search(r"quant\.skip='\[(.*)\]'", str(caught.value))[1].replace('"', "")
    report = quantize_model(model, QuantConfig(group_size=16, skip=patterns.split(",")))
    assert report.quantized


@torch.no_grad()
def test_dequantized_linears_compute_the_same(make_model) -> None:
    model, tokens = make_model("qwen2"), torch.arange(8)[None]
    quantize_model(model, QuantConfig(nbits=4, group_size=16))
    expected = model(tokens).logits
    dequantize_linears(model)
    assert not any(isinstance(module, HQQLinear) for module in model.modules())
    assert torch.equal(model(tokens).logits, expected)
