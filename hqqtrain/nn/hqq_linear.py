"""`HQQLinear`: a linear layer with a packed weight that is otherwise an ordinary module.

hqq keeps scale and zero in a dict, and its `.to` and `.half` do nothing. Here W_q, scale and zero
are frozen parameters, so every tool that moves, saves or shards modules handles them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hqqtrain.config.public_function import public_function
from hqqtrain.quant.quantize import QuantizedWeight, quantize_weight
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels import ops
from hqqtrain_kernels.matmul import PackedWeight, WeightParams

PACKED_PARAMETERS = ("W_q", "scale", "zero")
"""The parameters that form the packed weight; dimension 0 of each is the layout's units."""


class HQQLinear(nn.Module):
    """A linear layer y = x W'^T + bias with W' = (W_q - zero) * scale [out_features, in_features].

    All parameters are frozen. Gradients flow to the input only, and the input is not saved for
    backward.

    Moving works as for any module. Casting (`.half()`, `.to(torch.bfloat16)`) changes
    `compute_dtype` and the bias, but never the packed parameters.

    Args:
        in_features: Size of an input.
        out_features: Size of an output.
        bias: Whether the layer has a bias.
        spec: Settings of the quantization.
        compute_dtype: Dtype that the weight is dequantized to.
        storage_dtype: Dtype of W_q.
        device: Device of the parameters.
        name: Name of the layer, for error messages.

    Attributes:
        W_q: Packed codes [units, bytes of a unit], uint8, or the same bits viewed as a float
            `storage_dtype` with fewer columns.
        scale: [units, groups] in `spec.meta_dtype`, or a view of its bits after `view_packed_as`.
        zero: Like `scale`.
        bias: [out_features] in `compute_dtype`, or None.
        fetch_meta: Returns scale and zero on a device if they stay in host memory; None: they are
            where W_q is. `nn.offload` sets it.
    """

    fetch_meta: Callable[[torch.device], Sequence[Tensor]] | None = None

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
        columns = self.layout.unit_bytes // storage_dtype.itemsize  # of W_q, in its storage dtype
        self.W_q = empty(units, columns, dtype=storage_dtype)
        self.scale = empty(units, groups, dtype=spec.meta_dtype)
        self.zero = empty(units, groups, dtype=spec.meta_dtype)
        self.bias = empty(out_features, dtype=compute_dtype) if bias else None

    @classmethod
    @public_function(spec=QuantSpec)
    def from_linear(
        cls, linear: nn.Linear, spec: QuantSpec, *, compute_dtype: torch.dtype | None = None,
        storage_dtype: torch.dtype = torch.uint8, name: str = "weight",
    ) -> "HQQLinear":  # fmt: skip
        """Quantize `linear`; on the meta device, build an empty layer of the same shape.

        Args:
            linear: The layer to quantize; it is not modified.
            spec: Settings of the quantization.
            compute_dtype: Dtype that the weight is dequantized to; None: that of `linear`.
            storage_dtype: Dtype of W_q.
            name: Name of the layer, for error messages.

        Raises:
            UserError: group_size does not divide, or the weight contains NaN or infinity.
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
        """Copy the bits of a whole quantized weight."""
        self.W_q.data.view(torch.uint8).copy_(quantized.W_q)
        self.scale.data.copy_(quantized.scale)
        self.zero.data.copy_(quantized.zero)

    def view_packed_as(self, storage: torch.dtype) -> None:
        """View W_q, scale and zero as dtype `storage`: the same bits in fewer or more columns.

        FSDP1 concatenates parameters and ZeRO-3 flattens them; both need a single dtype.
        """
        for name in PACKED_PARAMETERS:
            bits = self.get_parameter(name).detach().view(storage)
            setattr(self, name, nn.Parameter(bits, requires_grad=False))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W' [out_features, in_features] in `dtype`, by default `compute_dtype`."""
        return ops.dequantize(*self._packed(), self.layout, dtype or self.compute_dtype)

    def packed_weight(self) -> PackedWeight:
        """Return the packed weight as the kernels take it."""
        params = WeightParams(
            in_features=self.in_features,
            nbits=self.layout.nbits,
            group_size=self.layout.group_size,
            axis=self.layout.axis,
            compute_dtype=self.compute_dtype,
        )
        return PackedWeight(*self._packed(), params)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features], in the dtype of x or of autocast."""
        if self.fetch_meta is not None and torch.is_grad_enabled():
            return self._forward_for_training(x)
        return ops.linear(x, *self._packed(), self.bias, self.layout, self.compute_dtype)

    def _forward_for_training(self, x: Tensor) -> Tensor:
        """Compute the output, and let the backward pass fetch scale and zero again."""
        packed = self._packed()
        positions = {tensor.data_ptr(): i for i, tensor in enumerate(packed) if i > 0}

        def save(tensor: Tensor) -> Tensor | int:
            return positions.get(tensor.data_ptr(), tensor)

        def restore(saved: Tensor | int) -> Tensor:
            return self._packed()[saved] if isinstance(saved, int) else saved

        with saved_tensors_hooks(save, restore):
            return ops.linear(x, *packed, self.bias, self.layout, self.compute_dtype)

    def _packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return W_q in its storage dtype, and scale and zero in `meta_dtype`, on one device."""
        if self.fetch_meta is not None:
            scale, zero = self.fetch_meta(self.W_q.device)
            return self.W_q, scale, zero
        meta_dtype = self.spec.meta_dtype
        if self.scale.dtype == meta_dtype:
            return self.W_q, self.scale, self.zero
        return self.W_q, self.scale.view(meta_dtype), self.zero.view(meta_dtype)

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"nbits={spec.nbits}, group_size={spec.group_size}, axis={spec.axis}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HQQLinear":
        """Move or cast the module, but never cast the packed parameters."""
        packed_ids = {id(getattr(self, name)) for name in PACKED_PARAMETERS}
        on_host = set() if self.fetch_meta is None else {id(self.scale), id(self.zero)}

        def keep_bits(tensor: Tensor) -> Tensor:
            if id(tensor) in on_host:
                return tensor
            result = fn(tensor)
            if id(tensor) in packed_ids and result.dtype != tensor.dtype:
                return tensor.to(result.device)  # a cast would destroy the bits of a float view
            return result

        # Only `fn` knows the dtype that it casts to. Apply it to a tensor of compute_dtype to see.
        probe = torch.empty(0, dtype=self.compute_dtype, device=self.W_q.device)
        self.compute_dtype = fn(probe).dtype
        return super()._apply(keep_bits, recurse)
