"""Compare what an export has written, read from its files, with the model it was made from."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.comparison import ExportComparison, LayerComparison, compare_layer
from hqqtrain.formats.dense import merge
from hqqtrain.formats.layers import PackedLayer, by_layer
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.quant.spec import QuantSpec

FP16_NORMAL = 2.0**-14
"""The smallest number that fp16 holds with full precision."""


class StoredLayer(NamedTuple):
    """A layer as it was read from the files.

    Attributes:
        weight: The weight that the other program computes with, fp32 [out_features, in_features].
        tensors: What is stored of it.
    """

    weight: Tensor
    tensors: Iterable[Tensor]


def compare_export(export: ModelExport, read: Callable[[str], StoredLayer]) -> ExportComparison:
    """Compare what was written, on the main rank alone. Collective.

    Args:
        export: The model that was written.
        read: Reads a layer by the name of its module.
    """

    def compare(name: str, layer: PackedLayer) -> LayerComparison:
        ours, stored = layer.dequantize(), read(name)
        if export.merged and name in export.merged.modules:
            ours = merge(export.merged, name, ours)
        return compare_layer(
            name, ours, stored.weight.to(ours.device), layer.steps(), stored.tensors
        )

    with export.comm.raise_on_all_ranks():
        layers = [
            compare(name, value)
            for name, value in by_layer(export.tensors(), export.settings, export.device)
            if isinstance(value, PackedLayer) and export.comm.is_main
        ]
    return ExportComparison(tuple(export.comm.all_gather_object(layers)[0]))


def as_linear(layer: PackedLayer) -> HQQLinear:
    """Return a linear, without a bias, with the weight of a layer and the dtype of its scale."""
    layout = layer.layout
    spec = QuantSpec(layout.nbits, layout.group_size, layout.axis, "rtn", layer.scale.dtype)
    linear = HQQLinear(layout.in_features, layout.out_features, False, spec)
    linear.load(layer.weight)
    return linear


def refuse_tiny_scales(name: str, layer: PackedLayer, fix: str) -> None:
    """Refuse scales that fp16 holds with few bits or none, unless their weights are all zero.

    Raises:
        UserError: There is one. `fix` is the end of the message.
    """
    tiny = layer.scale.float().abs() < FP16_NORMAL
    if not tiny.any() or not ((layer.dequantize() != 0) & (layer.for_each_weight(tiny) != 0)).any():
        return
    smallest = layer.scale.float().abs()[tiny].max().item()
    raise UserError(
        f"{name}: has a scale of {smallest:g}, which fp16 cannot hold with full precision (its "
        f"normal numbers begin at 6.1e-05); {fix}."
    )
