"""The linear layers of the base that may have an adapter: quantized ones, or dense ones.

With `quant.nbits=null` the same layers that another value would quantize stay dense. They get the
same adapters, so that the two trainings differ in the quantization alone.
"""

from typing import Self

from torch import nn

from hqqtrain.nn.hqq_linear import HQQLinear


class DenseLinear(nn.Linear):
    """A linear layer that `quant.nbits=null` leaves dense, and that may have an adapter.

    It computes what `nn.Linear` does. The class tells it from layers that `quant.skip` excludes.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Return a layer with the parameters of `linear`, which it shares."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer


BaseLinear = HQQLinear | DenseLinear
"""The classes of the layers that may have an adapter."""


def base_linears(model: nn.Module) -> dict[str, BaseLinear]:
    """Return the linear layers of `model` that may have an adapter, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, BaseLinear)
    }


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of every layer that may have an adapter, by name."""
    return {
        name: (layer.out_features, layer.in_features) for name, layer in base_linears(model).items()
    }
