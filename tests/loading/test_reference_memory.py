"""The memory for a full-precision model follows from shapes, and from what it shares."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from memory_estimates import meta_model, two_bit_config
from torch import nn

from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.strategies.registry import STRATEGIES
from hqqtrain.loading.reference_memory import ReferenceBytes, reference_bytes, shared_tensors
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.families.structure import find_decoder_layers
from hqqtrain.models.fqn import base_model
from hqqtrain.models.source import shipped_folder

VOCABULARY, HIDDEN, TOKENS = 4096, 256, 65536 // 4


@cache
def _model(skip: tuple[str, ...]) -> nn.Module:
    config = two_bit_config()
    config.quant.skip = list(skip)
    return meta_model("tiny", config)


def _bytes(
    reference: str, strategy: str = "single", skip: tuple[str, ...] = ("lm_head",)
) -> ReferenceBytes:
    return reference_bytes(
        reference, _model(skip), STRATEGIES[strategy](SINGLE_PROCESS), tokens=65536,
        sequence_tokens=512, dtype=torch.bfloat16, world_size=4,
    )  # fmt: skip


def test_a_whole_model_is_in_memory_or_sharded() -> None:
    assert _bytes("off") == ReferenceBytes()
    elements = 5770496
    assert _bytes("resident") == ReferenceBytes(whole=2 * elements, outputs=2 * TOKENS * HIDDEN)
    assert _bytes("resident", "fsdp2") == ReferenceBytes(whole=2 * elements // 4)


@pytest.mark.parametrize("reference", ["streamed", "cached"])
def test_a_streamed_model_has_a_layer_in_memory(reference: str) -> None:
    layers = find_decoder_layers(build_meta(load_hf_config(shipped_folder("tiny"))))
    layer = 2 * sum(parameter.numel() for parameter in layers[0].parameters())
    sharded = _bytes(reference, "fsdp2")
    assert sharded.outputs == 2 * TOKENS * HIDDEN
    assert sharded.layer == layer + TOKENS * 512
    assert sharded.outside == 2 * (VOCABULARY + 1) * HIDDEN  # embeddings and the last norm
    shared = _bytes(reference)
    assert shared == replace(sharded, outside=0, layer=sharded.layer - 2 * 2 * HIDDEN)


def test_quantized_and_trained_tensors_are_not_shared() -> None:
    model = meta_model("tiny", two_bit_config())
    embeddings = base_model(model).get_input_embeddings()
    assert shared_tensors(model).keys() >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert not [name for name in shared_tensors(model) if "proj" in name]
    embeddings.weight.requires_grad_(True)
    assert "model.embed_tokens.weight" not in shared_tensors(model)
