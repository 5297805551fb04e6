"""gemlite, Triton kernels by the authors of hqq.

Scale and zero are kept as they are. Its kernels for a few rows add partial sums to the output with
atomic operations, whose order changes from run to run. An output in fp32 loses nothing: the error
of one row in fp16 at 4 bits is 2.1e-4, and 1.9e-3 with an output in fp16 (2,048 numbers, H200).
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hqqtrain.inference.backends.base import InferenceBackend, Limits, RepackedLinear, codes_of
from hqqtrain.nn.hqq_linear import HQQLinear

BITS = (8, 4, 2, 1)
MAX_SPLITS = 16
"""The most splits of in_features that its kernels use."""


class GemliteLinear(RepackedLinear):
    """A linear layer in gemlite's layout."""

    def __init__(self, layer: HQQLinear) -> None:
        super().__init__(layer)
        gemlite: Any = import_module("gemlite")  # it asks for the GPU when it is imported
        dtype = {torch.bfloat16: gemlite.DType.BF16, torch.float16: gemlite.DType.FP16}[self.dtype]
        packed = gemlite.GemLiteLinear(
            W_nbits=layer.layout.nbits, group_size=layer.layout.group_size,
            in_features=layer.in_features, out_features=layer.out_features,
            input_dtype=dtype, output_dtype=gemlite.DType.FP32,
        )  # fmt: skip
        # It computes a weight in the dtype of the scale, where bf16 is too coarse for fp16.
        meta_dtype = layer.spec.meta_dtype if self.dtype == torch.bfloat16 else torch.float32
        scale, zero = (part.detach().to(meta_dtype) for part in (layer.scale, layer.zero))
        # By default it would round -zero * scale once more.
        packed.pack(codes_of(layer), scale, zero, fma_mode=False)
        self.settings: list[int] = packed.get_meta_args()
        tensors = packed.get_tensor_args()
        self.names = [f"tensor_{index}" for index in range(len(tensors))]
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_buffer(name, tensor.detach())

    def product(self, x: Tensor) -> Tensor:
        """Return x W'^T [rows, out_features] in fp32."""
        tensors = [self.get_buffer(name) for name in self.names]
        return _fp32_product(x, tensors, self.settings)


@torch.library.custom_op("hqqtrain::gemlite_product", mutates_args=())
def _fp32_product(x: Tensor, tensors: list[Tensor], settings: list[int]) -> Tensor:
    """Call gemlite's operator, which tells the compiler that its output has the dtype of x."""
    return torch.ops.gemlite.forward_functional(x, None, tensors, settings)


@_fp32_product.register_fake
def _(x: Tensor, tensors: list[Tensor], settings: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], tensors[0].shape[1], dtype=torch.float32)


class GemliteBackend(InferenceBackend):
    """gemlite."""

    name, package, install = "gemlite", "gemlite", "hqqtrain[gemlite]"
    limits = Limits(nbits={torch.bfloat16: BITS, torch.float16: BITS})

    def refusal(self, layer: HQQLinear) -> str | None:
        """Return why a layer cannot be computed, or None if it can.

        Its kernels divide in_features into up to 16 splits, in blocks of at most a group. Those of
        the last split read scales past the end of the row, if it is not a whole one, and the
        product is NaN (gemlite 0.6.0, 7 rows of 576 numbers, groups of 64).
        """
        layout = layer.layout
        if layout.in_features % (MAX_SPLITS * layout.group_size):
            return f"groups of {layout.group_size} in rows of {layout.in_features}"
        return super().refusal(layer)

    def repack(self, layer: HQQLinear) -> RepackedLinear:
        """Return the layer in gemlite's layout."""
        return GemliteLinear(layer)
