"""The kernels for 4 bits of PyTorch itself, known as tinygemm, which torchao and hqq use.

They compute (code - 8) * scale + shift in bf16, with shift = (8 - zero) * scale rounded to bf16:
an error of at most 1/64 of a step. The package torchao is not needed.
"""

import torch
from torch import Tensor

from hqqtrain import compat
from hqqtrain.inference.backends.base import InferenceBackend, Limits, RepackedLinear, codes_of
from hqqtrain.nn.hqq_linear import HQQLinear

MIDDLE = 8
"""The code that the kernels subtract."""


class TinygemmLinear(RepackedLinear):
    """A linear layer of 4 bits."""

    def __init__(self, layer: HQQLinear) -> None:
        super().__init__(layer)
        self.group_size = layer.layout.group_size
        self.register_buffer("codes", compat.pack_int4(codes_of(layer)))
        scale, zero = layer.scale.detach().float(), layer.zero.detach().float()
        pairs = torch.stack([scale.t(), ((MIDDLE - zero) * scale).t()], -1)
        self.register_buffer("scale_and_shift", pairs.to(self.dtype).contiguous())

    def product(self, x: Tensor) -> Tensor:
        """Return x W'^T [rows, out_features]."""
        return compat.int4_product(
            x, self.get_buffer("codes"), self.group_size, self.get_buffer("scale_and_shift")
        )


class TorchaoBackend(InferenceBackend):
    """tinygemm, on a GPU and on a CPU."""

    name = "torchao"
    limits = Limits(nbits={torch.bfloat16: (4,)}, devices=("cuda", "cpu"), multiple_of=(16, 32))

    def repack(self, layer: HQQLinear) -> RepackedLinear:
        """Return the layer with its codes in the tiles of tinygemm."""
        return TinygemmLinear(layer)
