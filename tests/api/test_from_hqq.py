"""Each test is a row of docs/from-hqq.md, whose first cell is its docstring."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from random_models import random_family
from small_model import small_model
from torch import nn
from transformers import AutoModelForCausalLM, HqqConfig

import hqqtrain
from hqqtrain.common.errors import UserError
from hqqtrain.inference.backends.base import RepackedLinear
from hqqtrain.models.offload import offloads_meta
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import cast_adapters
from hqqtrain.nn.staging import StagedTensors
from hqqtrain.quant.spec import QuantSpec
from hqqtrain.tasks.inference import quantize
from hqqtrain_kernels import backend

hqq_hf = pytest.importorskip("hqq.models.hf.base", reason="hqq is not installed here")
from hqq.core import quantize as theirs  # noqa: E402
from hqq.utils import patching  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-hqq.md"
TOKENS = torch.arange(16).view(2, 8)
Q = "model.layers.0.self_attn.q_proj"


def quantized_by_hqq(settings: dict) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
    hqq_hf.AutoHQQHFModel.quantize_model(model, settings, compute_dtype=torch.float32, device="cpu")
    return model.eval()


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def assert_like_hqq(model: nn.Module, of_hqq: nn.Module) -> None:
    """The weights differ in the rounding of scale and zero alone, and where hqq stops."""
    for name, layer in of_hqq.named_modules():
        if isinstance(layer, theirs.HQQLinear):
            expected = layer.dequantize()
            error = model.get_submodule(name).dequantize() - expected
            assert error.norm() < 0.02 * expected.norm(), name


def test_a_linear():
    """`HQQLinear(linear, quant_config, compute_dtype, device, initialize, del_orig)`"""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    settings = theirs.BaseQuantizeConfig(nbits=3, group_size=16, axis=0)
    expected = theirs.HQQLinear(
        linear, settings, compute_dtype=torch.float32, device="cpu", del_orig=False
    )
    spec = QuantSpec(3, 16, 0, "hqq", torch.float32)
    layer = HQQLinear.from_linear(linear, spec, compute_dtype=torch.float32)
    x = torch.randn(4, 64)
    torch.testing.assert_close(layer(x), expected(x), rtol=1e-3, atol=1e-3)
    assert HQQLinear.from_linear(linear.to("meta"), spec).W_q.is_meta
    assert layer.half()(x.half()).dtype == torch.float16


def test_a_config(dense):
    """`BaseQuantizeConfig(nbits, group_size, axis)`"""
    config = hqqtrain.QuantConfig(
        nbits=3, group_size=32, axis=1, solver="hqq", calibration=None, meta_dtype="fp32"
    )
    hqqtrain.quantize_model(dense, config)
    assert_like_hqq(dense, quantized_by_hqq(theirs.BaseQuantizeConfig(3, 32, axis=1)))


def test_meta_on_the_host(dense, tmp_path, monkeypatch):
    """`BaseQuantizeConfig(..., offload_meta=True)`"""
    expected = quantized_by_hqq(theirs.BaseQuantizeConfig(4, 32, axis=1))
    monkeypatch.setattr(StagedTensors, "copies_on_cpu", True)
    settings = {"nbits": 4, "group_size": 32, "solver": "hqq", "meta_dtype": "fp32"}
    config = hqqtrain.QuantConfig(**settings, calibration=None, offload_meta=True)
    hqqtrain.quantize_model(dense, config)
    assert offloads_meta(dense)
    assert_like_hqq(dense, expected)
    hqq_config = hqqtrain.HqqTrainConfig(**settings, offload_meta=True)
    assert "offload_meta" not in hqq_config.to_dict()
    loaded = AutoModelForCausalLM.from_pretrained(small_model(), quantization_config=hqq_config)
    assert offloads_meta(loaded)
    assert torch.equal(logits_of(loaded), logits_of(dense))
    hqqtrain.save_quantized(loaded, tmp_path / "saved")
    assert offloads_meta(hqqtrain.load_quantized(tmp_path / "saved", offload_meta=True))
    with pytest.raises(UserError, match=r"HqqTrainConfig\.offload_meta=3"):
        hqqtrain.HqqTrainConfig(offload_meta=3)


def test_settings_per_tag(dense):
    """a dict of `BaseQuantizeConfig`s per tag"""
    per_tag = {"self_attn.q_proj": (8, 32), "mlp.up_proj": (3, 16)}
    of_hqq = quantized_by_hqq(
        {tag: theirs.BaseQuantizeConfig(nbits, size, axis=1)
         for tag, (nbits, size) in per_tag.items()}
    )  # fmt: skip
    overrides = {tag: {"nbits": nbits, "group_size": size}
                 for tag, (nbits, size) in per_tag.items()}  # fmt: skip
    hqqtrain.quantize_model(
        dense, solver="hqq", meta_dtype="fp32", overrides={"*": None, **overrides}
    )
    assert sum(isinstance(module, HQQLinear) for module in dense.modules()) == 4
    assert_like_hqq(dense, of_hqq)


def test_a_model(dense):
    """`AutoHQQHFModel.quantize_model(model, quant_config, compute_dtype, device)`"""
    hqqtrain.quantize_model(dense, nbits=2, group_size=16, solver="hqq", meta_dtype="fp32")
    assert_like_hqq(dense, quantized_by_hqq(theirs.BaseQuantizeConfig(2, 16, axis=1)))


def test_while_loading(dense):
    """`from_pretrained(..., quantization_config=HqqConfig(nbits, group_size, dynamic_config))`"""
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(small_model(), quantization_config=HqqConfig(nbits=4))
    per_tag = {"self_attn.q_proj": {"nbits": 8, "group_size": 32}, "mlp.up_proj": {"nbits": 2}}
    config = hqqtrain.HqqTrainConfig(nbits=4, group_size=64, dynamic_config=per_tag)
    model = AutoModelForCausalLM.from_pretrained(small_model(), quantization_config=config)
    overrides = {"*": None, "self_attn.q_proj": {"nbits": 8, "group_size": 32},
                 "mlp.up_proj": {"nbits": 2, "group_size": 64}}  # fmt: skip
    hqqtrain.quantize_model(dense, overrides=overrides)
    assert torch.equal(logits_of(model), logits_of(dense))
    with pytest.raises(UserError, match=r"dynamic_config: overrides is given"):
        hqqtrain.HqqTrainConfig(dynamic_config=per_tag, overrides=overrides)
    with pytest.raises(UserError, match=r"dynamic_config: must map tags"):
        hqqtrain.HqqTrainConfig(dynamic_config={"q_proj": 4})


def test_save(quantized, tokenizer, tmp_path: Path):
    """`AutoHQQHFModel.save_quantized(model, folder)`"""
    hqqtrain.save_quantized(quantized, tmp_path / "folder", tokenizer)
    assert not [*(tmp_path / "folder").glob("*.pt")]
    assert torch.equal(
        logits_of(hqqtrain.load_quantized(tmp_path / "folder")), logits_of(quantized)
    )


def test_load(make_config, start_run, tmp_path: Path):
    """`AutoHQQHFModel.from_quantized(folder)`"""
    model = quantized_by_hqq(theirs.BaseQuantizeConfig(4, 32, axis=0))
    model.config.tie_word_embeddings = False  # hqq cannot save tied weights in this form
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    hqq_hf.AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "theirs"))
    for file in small_model().glob("tokenizer*"):
        (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"quantized by another program \(hqq\).* task=quantize"):
        hqqtrain.load_quantized(tmp_path / "theirs")
    config = make_config("quantize", model={"name_or_path": str(tmp_path / "theirs")})
    with start_run(config) as run:
        quantize(run)
    ours = hqqtrain.load_quantized(tmp_path / "runs" / "run", dtype=torch.float32)
    torch.testing.assert_close(logits_of(ours), logits_of(model), rtol=0, atol=1e-5)


def test_export_for_hqq(quantized, tmp_path: Path):
    """`AutoHQQHFModel.save_to_safetensors(model, folder)`"""
    comparison = hqqtrain.export(quantized, tmp_path / "hqq", "hqq")
    assert comparison.max_error == 0
    assert (tmp_path / "hqq" / "model.safetensors").exists()


def test_families():
    """`LlamaHQQ`, `MistralHQQ`"""
    for kind in ("llama", "mistral", "qwen3"):
        report = hqqtrain.quantize_model(random_family(kind), nbits=2, group_size=16, solver="rtn")
        assert len(report.quantized) == 14


def test_mixtral():
    """`MixtralHQQ`"""
    with pytest.raises(UserError, match=r"fused mixture-of-experts weights.*\*\.experts"):
        hqqtrain.quantize_model(random_family("mixtral"), nbits=2, group_size=16)
    model = random_family("mixtral")
    report = hqqtrain.quantize_model(
        model, nbits=2, group_size=16, solver="rtn", skip=["lm_head", "*.experts"]
    )
    assert Q in report.quantized


def test_backend():
    """`HQQLinear.set_backend(HQQBackend.PYTORCH)`"""
    try:
        assert backend.set_backend("torch") == "torch: requested"
    finally:
        backend.set_backend("auto")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_axis_0(axis: int, nbits: int):
    """`HQQLinear.set_backend(HQQBackend.ATEN)`"""
    spec = QuantSpec(nbits, 16, axis, "rtn", torch.float32)
    layer = HQQLinear.from_linear(nn.Linear(32, 48), spec)
    x = torch.randn(3, 32, requires_grad=True)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T + layer.bias)


@pytest.mark.parametrize("axis", [0, 1])
def test_compile(axis: int):
    """`torch.compile(model, fullgraph=True)`"""
    layers = [
        HQQLinear.from_linear(nn.Linear(16, 16), QuantSpec(nbits, 8, axis, "rtn", torch.float32))
        for nbits in (8, 4, 3, 2, 1)
    ]
    model, x = nn.Sequential(*layers), torch.randn(3, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    explained = torch._dynamo.explain(model)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_prepare(quantized):
    """`prepare_for_inference(model)`"""
    before = logits_of(quantized)
    hqqtrain.prepare_for_inference(quantized)
    torch.testing.assert_close(logits_of(quantized), before, rtol=1e-4, atol=1e-4)


def test_prepare_for_other_kernels(dense):
    """`prepare_for_inference(model, backend="torchao_int4")`, `"gemlite"`"""
    hqqtrain.quantize_model(dense.bfloat16(), nbits=4, group_size=64, solver="rtn")
    before = logits_of(dense)
    with pytest.raises(UserError, match="backend=gemlite: computes on cuda, and the device is cpu"):
        hqqtrain.prepare_for_inference(dense, backend="gemlite")
    hqqtrain.prepare_for_inference(dense, backend="torchao_int4")
    assert any(isinstance(module, RepackedLinear) for module in dense.modules())
    assert (logits_of(dense) - before).norm() < 0.03 * before.norm()
    with pytest.raises(UserError, match="was changed by prepare_for_inference"):
        hqqtrain.export(dense, "nowhere", "dense")


def test_dead_backends(quantized, tmp_path: Path):
    """`prepare_for_inference(model, backend="marlin")`, `"bitblas"`"""
    assert "marlin" not in inspect.getsource(patching.prepare_for_inference)
    for name in ("marlin", "bitblas"):
        with pytest.raises(UserError, match=rf"backend={name}: .* humming computes"):
            hqqtrain.prepare_for_inference(quantized, backend=name)
    hqqtrain.export(quantized, tmp_path / "out", "humming")
    assert (tmp_path / "out" / "config.json").exists()


def test_add_lora(quantized):
    """`PeftUtils.add_lora(model, {tag: {"r", "lora_alpha", "dropout"}})`"""
    model = hqqtrain.add_lora(
        quantized, target_modules=["self_attn.q_proj", "mlp.up_proj"], r=4, alpha=8,
        rank_pattern={"mlp.up_proj": 2}, alpha_pattern={"mlp.up_proj": 6},
    )  # fmt: skip
    layer = model.base_model.model.model.layers[0]
    assert (layer.self_attn.q_proj.r["default"], layer.mlp.up_proj.r["default"]) == (4, 2)
    assert layer.mlp.up_proj.scaling["default"] == 3


def test_cast_lora(quantized):
    """`PeftUtils.cast_lora_weights(model, dtype)`"""
    model = hqqtrain.add_lora(quantized, r=2, dtype="bf16")
    adapter = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in adapter.values()} == {torch.bfloat16}
    cast_adapters(model, torch.float16)
    assert {p.dtype for p in adapter.values()} == {torch.float16}
    assert logits_of(model).dtype == torch.float32


def test_save_and_load_lora(quantized, tmp_path: Path):
    """`PeftUtils.save_lora_weights(model, file)`"""
    hqqtrain.save_quantized(quantized, tmp_path / "base")
    model = hqqtrain.add_lora(quantized, r=2)
    model.save_pretrained(tmp_path / "adapter")
    again = hqqtrain.load_quantized(tmp_path / "base", adapter=tmp_path / "adapter")
    assert isinstance(again, PeftModel)
    assert torch.equal(logits_of(again), logits_of(model))


def test_load_lora(quantized, monkeypatch):
    """`PeftUtils.load_lora_weights(model, file)`"""
    state = {"lora_A": torch.ones(128, 2), "lora_B": torch.ones(2, 128),
             "scaling": torch.tensor(0.5)}  # fmt: skip
    monkeypatch.setattr("hqqtrain.api.hqq_lora._read", lambda _: {Q: state})
    before = logits_of(quantized)
    model = hqqtrain.load_hqq_lora(quantized, "lora.pt")
    assert not torch.equal(logits_of(model), before)


def test_merge_lora(quantized, tmp_path: Path):
    """`PeftUtils.merge_lora(model, params)`"""
    model = hqqtrain.add_lora(quantized, r=2)
    hqqtrain.export(model, tmp_path / "dense", "dense")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="cannot be merged into packed weights"):
        model.merge_and_unload()


def test_other_adapters(quantized, monkeypatch):
    """`lora_type`: `lora_with_fakequant`, `grouped_proj`; `train_bias`"""
    monkeypatch.setattr("hqqtrain.api.hqq_lora._read", lambda _: {Q: {"proj": torch.ones(2)}})
    with pytest.raises(UserError, match="has proj, and no LoRA"):
        hqqtrain.load_hqq_lora(quantized, "lora.pt")


def test_hqq_plus(quantized, tokenizer, text_file: Path):
    """HQQ+"""
    data = hqqtrain.load_data(text_file, tokenizer, max_seq_len=64)
    model = hqqtrain.add_lora(quantized, r=4)
    before = hqqtrain.evaluate(model, data).perplexity
    hqqtrain.train(model, data, max_steps=4, batch_size=4, lr=1e-2)
    assert hqqtrain.evaluate(model, data).perplexity < before


def test_every_row_is_a_test():
    rows = re.findall(r"^\| (.*?) \| ", PAGE.read_text("utf-8"), re.MULTILINE)
    cells = {cell for cell in rows if cell not in ("hqq", "---")}
    tests = {value.__doc__ for name, value in globals().items() if name.startswith("test_")}
    assert cells == {docstring for docstring in tests if docstring}
