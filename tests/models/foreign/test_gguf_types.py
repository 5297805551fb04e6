"""Blocks of GGUF, compared with the dequantization of the `gguf` package."""

import pytest
import torch
from gguf_models import random_blocks

from hqqtrain.models.foreign.gguf_types import BLOCK_TYPES

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed here")


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_weights_are_those_of_the_package(name):
    kind, data = BLOCK_TYPES[name], random_blocks(name, 3, 4)
    expected = gguf.quants.dequantize(data.reshape(3, -1), gguf.GGMLQuantizationType[name])
    blocks = torch.from_numpy(data)
    codes, scale = kind.codes(blocks), kind.scale(blocks)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 1 << kind.nbits
    assert scale.shape[-1] == kind.block_size // kind.group_size
    codes = codes.float().unflatten(-1, (-1, kind.group_size))
    if kind.offset:
        weight = codes * scale[..., None] + kind.offset(blocks)[..., None]
    else:
        weight = (codes - kind.center) * scale[..., None]
    torch.testing.assert_close(weight.reshape(3, -1), torch.from_numpy(expected), rtol=0, atol=1e-5)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert size == (kind.block_size, kind.block_bytes)


@pytest.mark.parametrize("name", [n for n, kind in BLOCK_TYPES.items() if not kind.offset])
def test_fp16_represents_the_scales_that_are_called_exact(name):
    kind = BLOCK_TYPES[name]
    scale = kind.scale(torch.from_numpy(random_blocks(name, 3, 4)))
    assert torch.equal(scale, scale.half().float()) == kind.is_exact
    assert kind.meta_dtype == torch.float16
