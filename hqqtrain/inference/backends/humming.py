"""humming, the kernels with float zeros of vLLM and SGLang, compiled at first use.

They compute (code - zero) * scale in the dtype of the model, in which they also hold scale and
zero. bf16 cannot hold the zero of 8 bits, and fp16 rounds it to 1/16 of a step.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hqqtrain.inference.backends.base import InferenceBackend, Limits, RepackedLinear, codes_of
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain_kernels.bit_stream import pack_bit_stream

FP16 = torch.finfo(torch.float16)
TENSORS = ("weight", "weight_scale", "zero_point", "locks")


# torch.compile sees one operator, so that humming's choice of a kernel, on the host, splits no
# graph. The locks are zero again when the product ends, so nothing is seen to change.
@torch.library.custom_op("hqqtrain::humming_linear", mutates_args=())
def humming_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor, locks: Tensor,
    config: str, out_features: int,
) -> Tensor:  # fmt: skip
    """Compute x W'^T [rows, out_features].

    Args:
        x: [rows, in_features], bf16 or fp16.
        weight: The codes in humming's layout.
        weight_scale: The scales in its layout, in the dtype of x.
        zero_point: The zeros, like the scales.
        locks: Zeros with which the blocks of a product wait for each other.
        config: humming's description of the layer, as JSON.
        out_features: Size of an output.
    """
    ops: Any = import_module("humming.ops")
    return ops.humming_gemm(
        layer_config=config, inputs=x, weight=weight, weight_scale=weight_scale,
        zero_point=zero_point, locks=locks,
    )  # fmt: skip


@humming_linear.register_fake
def _(
    x: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor, locks: Tensor,
    config: str, out_features: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(len(x), out_features)


class HummingLinear(RepackedLinear):
    """A linear layer in humming's layout."""

    def __init__(self, layer: HQQLinear) -> None:
        super().__init__(layer)
        module, device = import_module("humming.layer"), layer.W_q.device
        nbits = layer.layout.nbits
        with torch.cuda.device(device):  # humming computes on the current one
            repacked: Any = module.HummingLayer(
                shape_n=layer.out_features, shape_k=layer.in_features, torch_dtype=self.dtype,
                weight_config={
                    "dtype": f"uint{nbits}", "group_size": layer.layout.group_size,
                    "has_zero_point": True, "is_fp_zero_point": True,
                },
            ).to(device)  # fmt: skip
            repacked.load_from_tensors({
                "weight": pack_bit_stream(codes_of(layer), nbits),
                "weight_scale": layer.scale.detach(), "zero_point": layer.zero.detach(),
            })  # fmt: skip
            repacked.transform()
        self.config: str = repacked.humming_config.to_str()
        for name in TENSORS:
            self.register_buffer(name, getattr(repacked, name).detach())

    def product(self, x: Tensor) -> Tensor:
        """Return x W'^T [rows, out_features]."""
        tensors = [self.get_buffer(name) for name in TENSORS]
        return humming_linear(x, *tensors, self.config, self.out_features)


class HummingBackend(InferenceBackend):
    """humming."""

    name, package, install = "humming", "humming", "hqqtrain[humming]"
    limits = Limits(
        nbits={torch.bfloat16: (4, 3, 2, 1), torch.float16: (8, 4, 3, 2, 1)},
        multiple_of=(128, 64),  # a tile of its kernels for Hopper GPUs has 128 rows
    )

    def refusal(self, layer: HQQLinear) -> str | None:
        """Return why a layer cannot be computed, or None if it can."""
        reason = super().refusal(layer)
        if reason is None and layer.compute_dtype == torch.float16:
            size = layer.scale.detach().float().abs()
            if bool(((size < FP16.smallest_normal) & (size > 0) | (size > FP16.max)).any()):
                return "scales outside of the range of float16"
        return reason

    def repack(self, layer: HQQLinear) -> RepackedLinear:
        """Return the layer in humming's layout."""
        return HummingLinear(layer)
