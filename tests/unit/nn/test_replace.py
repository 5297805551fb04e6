"""The selection of linears to replace, and every way to select none by mistake."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from hqqtrain.config import QuantConfig, UserError
from hqqtrain.nn import HQQLinear, quantize_model
from hqqtrain.quant import QuantSpec, relative_error

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
    assert list(report.matched) == list(layers)
    assert len(layers) == 14
    assert report.skipped == ["lm_head"]
    assert report.covered == sum(m.in_features * m.out_features for m in layers.values())
    assert report.total == total
    assert report.share == report.covered / total
    for name, layer in layers.items():
        assert relative_error(dense[name], layer.dequantize()) < 1e-4
    assert model(ids).logits.isfinite().all()


def test_on_meta_it_only_builds() -> None:
    with torch.device("meta"):
        model = llama()
    report = quantize_model(model, QuantConfig(nbits=2))
    assert len(report.matched) == 14
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("pattern", ["*.q_proj", "self_attn.q_proj", "model.layers.?.*.q_proj"])
def test_overrides_by_glob_and_by_tag(pattern: str) -> None:
    overrides = {"*.mlp.*": {"nbits": 3}, pattern: {"nbits": 8, "group_size": None}}
    report = quantize_model(llama(), QuantConfig(nbits=2, overrides=overrides))
    assert report.matched["model.layers.1.self_attn.q_proj"] == QuantSpec(
        8, None, 1, "least_squares", torch.float32
    )
    assert report.matched["model.layers.1.mlp.up_proj"].nbits == 3
    assert report.matched["model.layers.1.self_attn.k_proj"].nbits == 2


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
    ],
)
def test_patterns_that_select_nothing_are_refused(settings: dict, message: str) -> None:
    model = llama()
    with pytest.raises(UserError, match=message):
        quantize_model(model, QuantConfig(**settings))
    assert not packed(model)


def test_the_default_skip_may_match_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    assert list(quantize_model(model, QuantConfig()).matched) == ["0"]


def test_a_model_without_linears() -> None:
    with pytest.raises(UserError, match=r"Sequential.*no nn\.Linear"):
        quantize_model(nn.Sequential(nn.Conv1d(2, 2, 1)), QuantConfig())


def test_fused_experts_are_refused_by_name_or_skipped() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=4))
    with pytest.raises(UserError, match=r"model\.layers\.0\.\S*experts\.\S*: \[4, "):
        quantize_model(model, QuantConfig())


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
