"""FSDP1 flattens the frozen parameters of decoder layers and nothing else."""

from collections.abc import Iterator

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed import destroy_process_group
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.bit_exactness import check_bit_exactness
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.local import is_sharded
from hqqtrain.distributed.strategies.base import ensure_process_group
from hqqtrain.distributed.strategies.fsdp1 import FSDP1
from hqqtrain.nn.lora import lora_config
from hqqtrain.nn.replace import quantize_model


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    ensure_process_group(1)
    yield
    destroy_process_group()


def _model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=33, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    quantize_model(model, QuantConfig(nbits=4, group_size=16, solver="rtn"))
    return get_peft_model(model, lora_config(AdapterConfig(r=2), model)).eval()


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(33)[None], use_cache=False).logits


def test_only_frozen_parameters_of_layers_are_flattened():
    model = _model()
    expected = _logits(model)
    strategy = FSDP1(SINGLE_PROCESS, torch.float32)
    strategy.check_model(model)
    assert strategy.wrap(model) is model, "PEFT's model stays the outermost"
    for name, param in model.named_parameters():
        in_layers = ".layers." in name
        assert is_sharded(param) == (in_layers and "lora_" not in name), name
        assert param.requires_grad == ("lora_" in name), name
    assert torch.equal(_logits(model), expected)


def test_a_model_without_adapters_is_wrapped_itself():
    base = _model().unload()
    expected = _logits(base)
    wrapped = FSDP1(SINGLE_PROCESS, torch.float32).wrap(base)
    assert wrapped is not base
    assert torch.equal(_logits(wrapped), expected)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_survive_in_one_process(storage: torch.dtype):
    check_bit_exactness(FSDP1(SINGLE_PROCESS, storage))
