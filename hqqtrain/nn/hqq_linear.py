"""`HQQLinear`: a linear layer whose weight is packed codes, and otherwise an ordinary module.

hqq keeps scale and zero in a dict and makes `.to` and `.half` do nothing; here they are frozen
parameters beside W_q, so that every tool that moves, saves or shards modules handles them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hqqtrain.quant.quantize import QuantizedWeight, quantize_weight
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels import ops

PACKED_PARAMETERS = ("W_q", "scale", "zero")
"""The parameters that together are the weight; dimension 0 of all three is the layout's units."""


class HQQLinear(nn.Module):
    """y = x W'^T + bias, with W' = (W_q - zero) * scale [out_features, in_features].

    W_q [units, bytes of a unit]: packed codes, uint8, or the same bits viewed as a float
    `storage_dtype` (fewer columns). scale, zero [units, groups]: `spec.meta_dtype`, or after
    `hold_as` such a view, too. bias [out_features] or None. All frozen; gradients reach the input
    only, which is not saved.

    Moving works as for any module. Casting (`.half()`, `.to(torch.bfloat16)`) changes the dtype
    the weight is dequantized to, `compute_dtype`, and the bias; never the packed parameters.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, spec: QuantSpec, *,
        compute_dtype: torch.dtype = torch.float32, storage_dtype: torch.dtype = torch.uint8,
        device: torch.device | str | None = None, name: str = "weight",
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.spec, self.compute_dtype = spec, compute_dtype
        self.layout = spec.layout(out_features, in_features, name)

        def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        units, groups = self.layout.units, self.layout.groups
        columns = self.layout.row_bytes // storage_dtype.itemsize
        self.W_q = empty(units, columns, dtype=storage_dtype)
        self.scale = empty(units, groups, dtype=spec.meta_dtype)
        self.zero = empty(units, groups, dtype=spec.meta_dtype)
        self.bias = empty(out_features, dtype=compute_dtype) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, spec: QuantSpec, *, compute_dtype: torch.dtype | None = None,
        storage_dtype: torch.dtype = torch.uint8, name: str = "weight",
    ) -> "HQQLinear":  # fmt: skip
        """Quantizes `linear`; on the meta device, makes an empty layer of its shape.

        Raises:
            UserError: group_size does not divide, or the weight holds NaN or Inf.
        """
        weight = linear.weight
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, spec,
            compute_dtype=compute_dtype or weight.dtype, storage_dtype=storage_dtype,
            device=weight.device, name=name,
        )  # fmt: skip
        if not weight.is_meta:
            layer.load(quantize_weight(weight.detach(), spec, name=name))
            if layer.bias is not None:
                layer.bias.data.copy_(linear.bias.detach())
        return layer.train(linear.training)

    def load(self, quantized: QuantizedWeight) -> None:
        """Copies the bits of a whole quantized weight."""
        self.W_q.data.view(torch.uint8).copy_(quantized.W_q)
        self.scale.data.copy_(quantized.scale)
        self.zero.data.copy_(quantized.zero)

    def hold_as(self, storage: torch.dtype) -> None:
        """W_q, scale and zero become views of one dtype, the same bits in fewer or more columns:
        for engines that join them (FSDP1) or cut them flat (ZeRO-3)."""
        for name in PACKED_PARAMETERS:
            held = self._parameters[name]
            assert held is not None
            self._parameters[name] = nn.Parameter(held.detach().view(storage), requires_grad=False)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' [out_features, in_features], in `compute_dtype` unless told otherwise."""
        return ops.dequantize(*self._packed(), self.layout, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in the dtype of x, or autocast's."""
        return ops.linear(x, *self._packed(), self.bias, self.layout, self.compute_dtype)

    def _packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_q as it is held, scale and zero as numbers."""
        meta = self.spec.meta_dtype
        if self.scale.dtype == meta:
            return self.W_q, self.scale, self.zero
        return self.W_q, self.scale.view(meta), self.zero.view(meta)

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"nbits={spec.nbits}, group_size={spec.group_size}, axis={spec.axis}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HQQLinear":
        packed = {id(self._parameters[name]) for name in PACKED_PARAMETERS}

        def keep_bits(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if id(tensor) in packed and changed.dtype != tensor.dtype:
                return tensor.to(changed.device)  # a cast would destroy the bits of a float view
            return changed

        self.compute_dtype = fn(
            torch.empty(0, dtype=self.compute_dtype, device=self.W_q.device)
        ).dtype
        return super()._apply(keep_bits, recurse)
