"""The weights of a block survive as saved tensors, and a dense one until the backward pass."""

import torch
from torch import nn

from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora_blocks.frozen import FrozenLinears, KeptWeight
from hqqtrain.quant.spec import QuantSpec

SPEC = QuantSpec(nbits=4, group_size=8, axis=1, solver="rtn", meta_dtype=torch.float32)


def test_weights_are_the_same_from_saved_tensors() -> None:
    dense = torch.ones(3, 16)
    packed = HQQLinear.from_linear(nn.Linear(16, 4), SPEC)
    frozen = FrozenLinears((dense, packed.packed_weight()), (None, packed.bias), (1.0, 2.0))
    restored = frozen.settings().take_weights(iter(frozen.tensors()))
    assert restored[0] is dense
    assert restored[1] == packed.packed_weight()


def test_a_kept_weight_is_used_once_and_only_in_its_dtype() -> None:
    W, kept, again = torch.ones(2, 2), KeptWeight(), [torch.zeros(2, 2)]
    kept.keep(W)
    assert kept.take(again, torch.float32) is W
    assert kept.take(again, torch.float32) is again[0]
    kept.keep(W)
    assert kept.take(again, torch.bfloat16).dtype == torch.bfloat16
