"""Adapters are standard PEFT: trained on packed weights, loaded by PEFT on the dense model."""

import copy
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.formats.packed import BASE_FINGERPRINT, fingerprinted
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import (
    HQQLoraLinear,
    cast_adapters,
    init_adapters,
    inject_adapters,
    lora_config,
    target_linears,
)
from hqqtrain.nn.replace import quantize_model

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=32,
    num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
)  # fmt: skip
IDS = torch.arange(64).remainder(32).view(2, 32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def packed() -> nn.Module:
    model = AutoModelForCausalLM.from_config(LLAMA)
    quantize_model(model, QuantConfig(nbits=2, group_size=16))
    return model


def dense_of(packed: nn.Module) -> nn.Module:
    """Return the dense Llama with the dequantized weights."""
    dense = AutoModelForCausalLM.from_config(LLAMA)
    state = {k: v for k, v in packed.state_dict().items() if k in dense.state_dict()}
    for name, module in packed.named_modules():
        if isinstance(module, HQQLinear):
            state[f"{name}.weight"] = module.dequantize()
    dense.load_state_dict(state)
    return dense.eval()


def train(model: nn.Module, steps: int = 3) -> list[float]:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


ADAPTERS = [
    AdapterConfig(r=4),
    AdapterConfig(r=4, kind="rslora", alpha=16),
    AdapterConfig(r=4, dropout=0.2, alpha=2.5),
    AdapterConfig(r=2, init="gaussian", target_modules=["*.q_proj", "*.0.mlp.*"]),
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["lora", "rslora", "dropout", "gaussian"])
def test_a_trained_adapter_loads_with_stock_peft_on_the_dense_model(
    packed: nn.Module, adapter: AdapterConfig, tmp_path: Path
) -> None:
    dense = dense_of(packed)
    model = get_peft_model(packed, lora_config(adapter, packed))
    before = {n: p.clone() for n, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}
    model.eval().save_pretrained(tmp_path)
    # The adapter records its base, whose dequantized weights this model has.
    setattr(dense.config, BASE_FINGERPRINT, fingerprinted(model).fingerprint)
    stock = PeftModel.from_pretrained(dense, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, dense_of(packed_of(model))(IDS).logits)
    assert not torch.allclose(stock(IDS).logits, dense_of(packed_of(model))(IDS).logits)


def packed_of(model: PeftModel) -> nn.Module:
    return copy.deepcopy(model).unload()


def test_rslora_scales_by_the_root_of_r(packed: nn.Module) -> None:
    adapter = AdapterConfig(kind="rslora", r=16, alpha=8)
    model = get_peft_model(packed, lora_config(adapter, packed))
    layers = [m for m in model.modules() if isinstance(m, HQQLoraLinear)]
    assert len(layers) == 14
    assert {layer.scaling["default"] for layer in layers} == {2.0}


def test_gradients_are_those_on_the_dense_model(packed: nn.Module) -> None:
    dense, gradients = dense_of(packed), []
    for base in (packed, dense):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        if base is packed:
            adapter = AdapterConfig(r=4, target_modules=["*.q_proj", "*.down_proj"])
            config._custom_modules = lora_config(adapter, packed)._custom_modules
        model = get_peft_model(base, config).train()
        model(IDS, labels=IDS).loss.backward()
        named = model.named_parameters()
        gradients.append({n: p.grad for n, p in named if p.grad is not None})
    assert len(gradients[0]) == 8
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["*"], ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (["*.q_proj"], ["q_proj"]),
        (["self_attn.v_proj"], ["v_proj"]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("v_proj", ["v_proj"]),
        (["1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (
            "all-linear",
            ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        ),
        (
            ["all-linear", "q_proj"],
            ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        ),
    ],
)
def test_target_modules_are_short_names_if_unambiguous(
    packed: nn.Module, targets: list[str] | str, expected: list[str]
) -> None:
    config = lora_config(AdapterConfig(target_modules=targets), packed)
    assert sorted(config.target_modules) == expected


def test_a_linear_left_in_full_precision_gets_no_adapter() -> None:
    model = AutoModelForCausalLM.from_config(LLAMA)
    quantize_model(model, QuantConfig(group_size=16, skip=["lm_head", "model.layers.0.*.q_proj"]))
    peft = get_peft_model(model, lora_config(AdapterConfig(r=2), model))
    adapted = {n for n, m in peft.named_modules() if isinstance(m, HQQLoraLinear)}
    assert len(adapted) == 13
    assert not any("layers.0.self_attn.q_proj" in n or "lm_head" in n for n in adapted)


def test_all_linear_leaves_out_the_head() -> None:
    model = AutoModelForCausalLM.from_config(LLAMA)
    quantize_model(model, QuantConfig(group_size=16, skip=[]))
    everything = target_linears(AdapterConfig(), model)
    assert "lm_head" in everything
    assert target_linears(AdapterConfig(target_modules="all-linear"), model) == everything[:-1]


@pytest.mark.parametrize("glob", ["*.q_prj", "lm_head", "self_attn", "q_prj"])
def test_targets_that_match_nothing(packed: nn.Module, glob: str) -> None:
    with pytest.raises(UserError, match=r"adapter\.target_modules=") as caught:
        lora_config(AdapterConfig(target_modules=["*.k_proj", glob]), packed)
    assert glob in str(caught.value)


MAMBA = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


@pytest.mark.parametrize(
    ("kind", "sizes", "allowed"),
    [
        ("mamba", {}, "in_proj,x_proj,dt_proj"),
        ("mamba2", {"num_heads": 4, "head_dim": 8, "n_groups": 1}, "in_proj"),
    ],
)
def test_what_peft_refuses_is_named_with_what_it_accepts(kind, sizes, allowed) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**MAMBA | sizes))
    quantize_model(model, QuantConfig(group_size=None))

    def inject(targets: list[str]) -> nn.Module:
        adapter = AdapterConfig(r=2, target_modules=targets)
        lora, names = lora_config(adapter, model), target_linears(adapter, model)
        return inject_adapters(model, lora, names, "adapter.target_modules=[*]")

    with pytest.raises(UserError) as caught:
        inject(["*"])
    message = str(caught.value)
    assert message.startswith("adapter.target_modules=[*]: PEFT puts no adapter on out_proj of ")
    assert f"use adapter.target_modules=[{allowed}]." in message
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**MAMBA | sizes))
    quantize_model(model, QuantConfig(group_size=None))
    adapted = inject(allowed.split(","))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == len(
        allowed.split(",")
    )


def test_merging_into_packed_weights_is_refused(packed: nn.Module) -> None:
    model = get_peft_model(packed, lora_config(AdapterConfig(r=2), packed))
    with pytest.raises(UserError, match="task=export"):
        model.merge_and_unload()
    with pytest.raises(UserError, match="task=export"):
        model.merge_adapter()


def test_no_warnings_and_nothing_private_in_the_saved_config(
    packed: nn.Module, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(packed, lora_config(AdapterConfig(r=2), packed))
    assert not [w for w in caught if "HQQ" in str(w.message)]
    model.save_pretrained(tmp_path)
    assert "custom" not in (tmp_path / "adapter_config.json").read_text()
    assert sorted(LoraConfig.from_pretrained(tmp_path).target_modules)[0] == "down_proj"


def seeded(seed: int, kind: str, *, on_meta: bool) -> dict[str, torch.Tensor]:
    """Return every adapter parameter after `init_adapters`, by name."""
    with torch.device("meta" if on_meta else "cpu"):
        model = AutoModelForCausalLM.from_config(LLAMA)
        quantize_model(model, QuantConfig(group_size=16))
        model = get_peft_model(
            model, lora_config(AdapterConfig(r=4), model), low_cpu_mem_usage=on_meta
        )
    if on_meta:
        assert all(p.is_meta for n, p in model.named_parameters() if "lora_" in n)
        model.to_empty(device="cpu")
    init_adapters(model, seed, kind, lambda param, full: param.data.copy_(full))
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("kind", ["default", "gaussian"])
def test_initial_values_depend_on_seed_and_name_only(kind: str) -> None:
    here, there, other = (
        seeded(7, kind, on_meta=False),
        seeded(7, kind, on_meta=True),
        seeded(8, kind, on_meta=False),
    )
    assert list(here) == list(there)
    assert len(here) == 28
    values = [v for n, v in here.items() if "lora_A" in n]
    for name, value in here.items():
        assert torch.equal(value, there[name])
        if "lora_B" in name:
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])
            assert sum(v.shape == value.shape and torch.equal(v, value) for v in values) == 1


def test_the_distribution_is_that_of_peft() -> None:
    for kind, init in (("default", True), ("gaussian", "gaussian")):
        model = nn.Sequential(nn.Linear(512, 32))
        peft = get_peft_model(model, LoraConfig(r=64, target_modules=["0"], init_lora_weights=init))
        (theirs,) = (p for n, p in peft.named_parameters() if "lora_A" in n)
        expected = theirs.detach().clone()
        init_adapters(peft, 0, kind, lambda param, full: param.data.copy_(full))
        for statistic in (torch.std, lambda t: t.abs().quantile(0.9), lambda t: t.abs().mean()):
            assert statistic(theirs).item() == pytest.approx(statistic(expected).item(), rel=0.03)
        assert abs(theirs.mean().item()) < 0.02 * theirs.std().item() + 1e-3


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_of_16_bits(packed: nn.Module, autocast: bool) -> None:
    """Adapters in bf16 train, and the packed weights keep their dtypes."""
    model = get_peft_model(packed, lora_config(AdapterConfig(r=4, alpha=8), packed))
    init_adapters(model, 0, "default", write=lambda param, value: param.data.copy_(value))
    before = {n: p.dtype for n, p in model.named_parameters() if not p.requires_grad}
    cast_adapters(model, torch.bfloat16)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}
    assert {n: p.dtype for n, p in model.named_parameters() if not p.requires_grad} == before
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = train(model, 8)
    assert losses[-1] < losses[0]


def _refuse_memory(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    assert tensor.is_meta
    return tensor


def test_no_matrix_is_allocated_when_adapters_are_put_on_a_model_without_weights():
    """A rank of 2^20 would need 2 GiB for each matrix A of this model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(
            hidden_size=512, intermediate_size=512, num_hidden_layers=1, vocab_size=32,
            num_attention_heads=4,
        ))  # fmt: skip
    quantize_model(model, QuantConfig(nbits=2, group_size=16))
    config = AdapterConfig(r=1 << 20)
    with mock.patch.object(torch.nn.init, "kaiming_uniform_", side_effect=_refuse_memory):
        injected = inject_adapters(
            model, lora_config(config, model), target_linears(config, model), "target_modules"
        )
    assert {p.device.type for p in injected.parameters()} == {"meta"}
