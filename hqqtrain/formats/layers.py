"""Read a quantized model layer by layer from the stream of its tensors."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS
from hqqtrain.quant.quantize import QuantizedWeight, dequantize_weight
from hqqtrain_kernels import Layout, pack, unpack

Tensors = Iterable[tuple[str, Tensor]]
"""A stream of (name, tensor)."""


@dataclass(frozen=True)
class PackedLayer:
    """The packed weight of a linear layer.

    Attributes:
        weight: W_q, scale and zero.
        layout: How the weight is packed.
    """

    weight: QuantizedWeight
    layout: Layout

    @property
    def codes(self) -> Tensor:
        """The codes, uint8 [units, codes of a unit]; for axis 1, [out_features, in_features]."""
        return unpack(self.weight.W_q, self.layout.nbits, self.layout.unit_codes)

    @property
    def scale(self) -> Tensor:
        """The scale [units, groups]."""
        return self.weight.scale

    @property
    def zero(self) -> Tensor:
        """The zero [units, groups]."""
        return self.weight.zero

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero: Tensor, layout: Layout
    ) -> "PackedLayer":
        """Pack `codes`, uint8 [units, codes of a unit], with scale and zero [units, groups]."""
        return cls(QuantizedWeight(pack(codes, layout.nbits), scale, zero), layout)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out_features, in_features]."""
        return dequantize_weight(self.weight, self.layout, dtype)

    def for_each_weight(self, of_groups: Tensor) -> Tensor:
        """Return a number of each group [units, groups] as one of each weight, fp32 [out, in]."""
        ones, zero = torch.ones_like(self.codes), torch.zeros_like(self.zero)
        return PackedLayer.from_codes(ones, of_groups.float(), zero, self.layout).dequantize()

    def steps(self) -> Tensor:
        """Return the distance of two neighboring codes, fp32 [out_features, in_features]."""
        return self.for_each_weight(self.scale.abs())


def by_layer(
    tensors: Tensors, settings: QuantizedSettings, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor | PackedLayer]]:
    """Collect the W_q, scale and zero of each quantized layer of a stream.

    Args:
        tensors: The stream that `model_tensors` yields, or the tensors of a quantized folder.
        settings: The settings of the quantized model.
        device: The device of the packed layers.

    Yields:
        (name, tensor) of every dense tensor, and (name of the module, layer) of every packed one.
    """
    incomplete: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        module, _, attribute = name.rpartition(".")
        if module not in settings.modules:
            yield name, tensor
        elif attribute in PACKED_PARAMETERS:
            packed = incomplete.setdefault(module, {})
            packed[attribute] = tensor.to(device)
            if len(packed) == len(PACKED_PARAMETERS):
                weight = QuantizedWeight(**incomplete.pop(module))
                yield module, PackedLayer(weight, settings.modules[module].layout)
        elif tensor.numel():  # not a placeholder of the folder
            yield name, tensor
    assert not incomplete, f"tensors are missing of {sorted(incomplete)}"
