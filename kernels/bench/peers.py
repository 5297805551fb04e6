"""The linear layers that ours is compared with, each made from the same dense weight.

Every function imports its library itself and may raise. A library that is missing or fails becomes
a row that says so.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hqqtrain_kernels as kernels
from hqqtrain.nn import HQQLinear
from hqqtrain.quant import QuantSpec

Layer = Callable[[Tensor], Tensor]
GROUP_SIZE = 64


def cublas(W: Tensor, nbits: int) -> Layer:
    """Return the dense layer, the baseline."""
    layer = _dense(W)
    layer.weight.data = W.clone()
    return layer


def ours(W: Tensor, nbits: int) -> Layer:
    """Return our layer as models use it. The solver does not affect speed: take the fastest."""
    return _quantized(W, nbits)


def ours_dequantized(W: Tensor, nbits: int) -> Layer:
    """Dequantize our weight and multiply with cuBLAS, which a fused kernel must beat."""
    layer = _quantized(W, nbits)
    parts = layer.W_q, layer.scale, layer.zero, layer.layout
    return lambda x: F.linear(x, kernels.dequantize(*parts, x.dtype))


def bitsandbytes_nf4(W: Tensor, nbits: int) -> Layer:
    """Return bitsandbytes' NF4 layer, which has 4 bits only."""
    import bitsandbytes as bnb

    if nbits != 4:
        raise NotImplementedError("nf4 has 4 bits")
    layer = bnb.nn.Linear4bit(
        W.shape[1], W.shape[0], bias=False, compute_dtype=W.dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(W.cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(W.device)


def hqq_pytorch(W: Tensor, nbits: int) -> Layer:
    """Return hqq's layer with its default backend, the one it trains with."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend
    from hqq.core.quantize import HQQLinear as TheirLinear

    TheirLinear.set_backend(HQQBackend.PYTORCH)
    config = BaseQuantizeConfig(nbits=nbits, group_size=GROUP_SIZE, axis=1)
    dense = _dense(W)
    dense.weight.data = W.clone()
    return TheirLinear(dense, config, compute_dtype=W.dtype, device=str(W.device))


def gemlite(W: Tensor, nbits: int) -> Layer:
    """Return gemlite's layer on hqq's weight. It autotunes, and has no backward."""
    from gemlite.helper import A16Wn

    return A16Wn(device=str(W.device)).from_hqqlinear(hqq_pytorch(W, nbits))


def _quantized(W: Tensor, nbits: int) -> HQQLinear:
    spec = QuantSpec(nbits, GROUP_SIZE, 1, "rtn", torch.bfloat16)
    dense = _dense(W)
    dense.weight.data = W
    return HQQLinear.from_linear(dense, spec, compute_dtype=W.dtype)


def _dense(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta", dtype=W.dtype)
    return layer.to_empty(device=W.device).requires_grad_(False)
