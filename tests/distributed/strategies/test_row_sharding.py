"""FSDP1 and ZeRO-3 compute the same as an unsharded model, with real processes."""

import importlib.util

import pytest
import torch
from peft import get_peft_model
from ranks import CPU, on_ranks
from torch import nn
from transformers import LlamaConfig

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.local import copy_from_full, full_tensor, local_tensor
from hqqtrain.distributed.strategies.fsdp1 import FSDP1
from hqqtrain.distributed.strategies.registry import STRATEGIES
from hqqtrain.distributed.strategies.zero3 import ZeRO3
from hqqtrain.loading.load import load_model
from hqqtrain.models.build import build_meta
from hqqtrain.models.fqn import base_model, expected_shapes
from hqqtrain.models.weights.synthetic import SyntheticReader
from hqqtrain.nn.lora import init_adapters, lora_config
from hqqtrain.nn.replace import quantize_model

pytestmark = pytest.mark.ranks

FLAT = ["fsdp1", *["zero3"] * (importlib.util.find_spec("deepspeed") is not None)]


def make_model(group_size: int | None = 16, **quant: object) -> nn.Module:
    """Build a model whose rows ranks share unevenly, with biases, tied embeddings and adapters."""
    config = LlamaConfig(
        vocab_size=101, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, attention_bias=True,
        tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    model: nn.Module = build_meta(config, torch.float32)
    quantize_model(model, QuantConfig(nbits=2, group_size=group_size, solver="rtn", **quant))
    lora = lora_config(AdapterConfig(r=4), model)
    return get_peft_model(base_model(model), lora, low_cpu_mem_usage=True)


def fill(model: nn.Module, comm: Communicator) -> None:
    reader = SyntheticReader(expected_shapes(model, packed=False), torch.float32, CPU)
    load_model(model, reader, comm)
    init_adapters(model, 0, "default", copy_from_full)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(50)[None], use_cache=False).logits


def runs_alike(rank: int, comm: Communicator, name: str, storage: torch.dtype) -> None:
    strategy = STRATEGIES[name](comm, storage)
    alone = make_model()
    fill(alone, SINGLE_PROCESS)
    model = make_model()
    strategy.shard(model)
    fill(model, comm)
    trained = {n: full_tensor(p) for n, p in model.named_parameters() if p.requires_grad}
    model = strategy.wrap(model)
    torch.testing.assert_close(logits(model), logits(alone))
    torch.testing.assert_close(logits(model), logits(alone))  # gather and free a second time
    whole = sum(p.nbytes for n, p in alone.named_parameters() if ".W_q" in n)
    held = sum(local_tensor(p).nbytes for n, p in model.named_parameters() if ".W_q" in n)
    assert held <= 1.1 * whole / comm.size + 4096, (held, whole)
    for name, param in model.named_parameters():
        if param.requires_grad:
            expected = trained[name.replace("_fsdp_wrapped_module.", "")]
            assert torch.equal(full_tensor(param), expected), name


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("size", [2, 3])
def test_sharded_model_equals_the_unsharded_one(name: str, size: int):
    assert on_ranks(runs_alike, size, name, torch.float32) == [""] * size


@pytest.mark.skipif("zero3" not in FLAT, reason="needs deepspeed")
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.uint8])
def test_zero3_with_other_storage_dtypes(storage: torch.dtype):
    assert on_ranks(runs_alike, 2, "zero3", storage) == ["", ""]


@pytest.mark.parametrize(("strategy", "storage", "options", "message"), [
    ("fsdp1", torch.bfloat16, {},
     r"quant\.storage_dtype=bf16: .*is torch\.float32.*use quant\.storage_dtype=fp32"),
    ("fsdp1", torch.float32, {"group_size": None},
     r"1 scales of torch\.bfloat16, 2 bytes.* use quant\.meta_dtype=fp32"),
    ("zero3", torch.float32, {"group_size": 32},
     r"3 scales of torch\.bfloat16, 6 bytes.* use quant\.storage_dtype=bf16"),
])  # fmt: skip
def test_unsupported_dtypes_are_refused(strategy, storage, options, message):
    with pytest.raises(UserError, match=message):
        STRATEGIES[strategy](SINGLE_PROCESS, storage).check_model(make_model(**options))


def test_supported_dtypes_are_accepted():
    fsdp1 = FSDP1(SINGLE_PROCESS, torch.float32)
    fsdp1.check_model(make_model())
    fsdp1.check_model(make_model(group_size=None, meta_dtype="fp32"))
    ZeRO3(SINGLE_PROCESS, torch.bfloat16).check_model(make_model(group_size=None))
