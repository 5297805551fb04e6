"""`quantize_model` does what a quantization while loading does, and its messages name arguments."""

import pytest
import torch
from small_model import small_model
from torch import nn
from transformers import AutoModelForCausalLM

import hqqtrain
from hqqtrain.common.errors import UserError
from hqqtrain.nn.hqq_linear import HQQLinear

TOKENS = torch.arange(16).view(2, 8)
SETTINGS = {"nbits": 3, "group_size": 32, "overrides": {"self_attn.o_proj": {"nbits": 8}}}


def test_like_a_quantization_while_loading(dense):
    report = hqqtrain.quantize_model(dense, **SETTINGS)
    config = hqqtrain.HqqTrainConfig(**SETTINGS)
    other = AutoModelForCausalLM.from_pretrained(small_model(), quantization_config=config)
    with torch.no_grad():
        assert torch.equal(dense(TOKENS).logits, other(TOKENS).logits)
    assert dense.config.quantization_config.to_dict() == other.config.quantization_config.to_dict()
    assert (len(report.quantized), len(report.skipped)) == (14, 1)
    assert report.quantized["model.layers.1.self_attn.o_proj"].nbits == 8


def test_a_config_in_place_of_keywords(dense):
    report = hqqtrain.quantize_model(dense, hqqtrain.QuantConfig(nbits=1, group_size=16))
    assert {spec.nbits for spec in report.quantized.values()} == {1}


def test_any_module():
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU())
    hqqtrain.quantize_model(model, nbits=8, group_size=16)
    assert isinstance(model[0], HQQLinear)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"nbits": 5}, "nbits=5: allowed are 8, 4, 3, 2, 1, None"),
    ({"nbits": None}, "nbits=None: nothing would be quantized"),
    ({"group_size": 7}, "group_size=7: does not divide in_features"),
    ({"bits": 2}, "bits is no setting; allowed are nbits.* Did you mean nbits?"),
    ({"skip_modules": []}, "skip_modules is no setting.* Did you mean skip?"),
    ({"solver": "gptq"}, "solver=gptq: needs text to calibrate with; use task=quantize"),
    ({"skip": ["nowhere"]}, "skip=nowhere: matches no linear layer"),
    ({"config": hqqtrain.QuantConfig(calibration="a.txt")}, "calibration=a.txt: has no effect"),
    ({"config": hqqtrain.QuantConfig(backend="torch")}, "backend=torch: .*set_backend"),
    ({"skip": [5]}, r"skip=\[5\]: must be a list of strings"),
    ({"config": {"nbits": 2}}, "config is a dict; give a QuantConfig, or keywords"),
    ({"config": hqqtrain.QuantConfig(), "nbits": 2}, "config and nbits are given"),
])  # fmt: skip
def test_settings_that_are_not_allowed(dense, arguments: dict, message: str):
    with pytest.raises(UserError, match=f"^quantize_model: {message}"):
        hqqtrain.quantize_model(dense, **arguments)
    assert not any(isinstance(module, HQQLinear) for module in dense.modules())
    assert not hasattr(dense.config, "quantization_config")


def test_a_model_quantized_in_inference_mode_is_trained(dense):
    with torch.inference_mode():
        hqqtrain.quantize_model(dense, nbits=2, group_size=32, solver="rtn")
    adapted, tokens = hqqtrain.add_lora(dense, r=2), torch.arange(8)[None]
    adapted(tokens, labels=tokens).loss.backward()
    with pytest.raises(UserError, match="model is a list; it must be a module of PyTorch"):
        hqqtrain.quantize_model([dense])


def test_a_quantized_model_and_one_with_adapters_are_refused(quantized):
    with pytest.raises(UserError, match="is quantized already"):
        hqqtrain.quantize_model(quantized)
    hqqtrain.add_lora(quantized, r=2)
    with pytest.raises(UserError, match="has adapters"):
        hqqtrain.quantize_model(quantized)
