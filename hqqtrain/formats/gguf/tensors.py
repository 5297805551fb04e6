"""Stream the tensors of a model into a GGUF file."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.dense import merge, round_finite
from hqqtrain.formats.gguf.block_types import BlockType
from hqqtrain.formats.gguf.blocks import encode_blocks, quantize_q8_0
from hqqtrain.formats.gguf.conversion import Conversion
from hqqtrain.formats.gguf.writer import GgufFile, TensorEntry, dense_type
from hqqtrain.formats.layers import PackedLayer, by_layer
from hqqtrain.formats.read_back import refuse_tiny_scales

_FIX = "use export.gguf_type=Q8_0, or another export.format"


def gguf_entries(
    export: ModelExport, conversion: Conversion, kinds: Mapping[str, BlockType]
) -> dict[str, TensorEntry]:
    """Return all tensors of the file, by their names in GGUF.

    Args:
        export: The model.
        conversion: The names and the dense tensors.
        kinds: Module -> the type of its blocks.
    """
    quantized = {
        conversion.name(f"{name}.weight"): TensorEntry(
            kinds[name].name, (module.out_features, module.in_features)
        )
        for name, module in export.settings.modules.items()
    }
    return conversion.entries() | quantized


class TensorStream:
    """Writes the tensors of a model, each as it arrives."""

    def __init__(
        self, export: ModelExport, conversion: Conversion, kinds: Mapping[str, BlockType],
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Prepare to write; `dtype` is that of dense matrices, and `kinds` as in `gguf_entries`."""
        self._export, self._conversion, self._kinds, self._dtype = export, conversion, kinds, dtype

    def write(self, file: GgufFile | None) -> None:
        """Write all tensors. Collective.

        Args:
            file: The file; None on the ranks that only take part in gathering the tensors.

        Raises:
            UserError: A value cannot be stored.
            OSError: The disk is full or fails. The stream is consumed to its end nevertheless,
                because it may consist of collective gathers.
        """
        failure: Exception | None = None
        export = self._export
        for name, value in by_layer(export.tensors(), export.settings, export.device):
            if file is None or failure:
                continue
            try:
                self._write(file, name, value)
            except Exception as error:
                failure = error
        if failure:
            raise failure
        if file:
            for name, tensor in self._conversion.extra():
                file.write(name, tensor)
            file.finish()

    def _write(self, file: GgufFile, name: str, value: Tensor | PackedLayer) -> None:
        if isinstance(value, PackedLayer):
            tensor_name, data = f"{name}.weight", self._blocks(name, value)
            order = self._conversion.order(tensor_name)
            file.write(
                self._conversion.name(tensor_name),
                data if order is None else data[order.to(data.device)],
            )
            return
        dense = self._conversion.dense(name, self._trained(name, value))
        if dense is not None:
            dtype = dense_type(tuple(dense.shape), self._dtype)
            file.write(self._conversion.name(name), round_finite(name, dense, dtype))

    def _blocks(self, name: str, layer: PackedLayer) -> Tensor:
        """Return the blocks of a layer, with its adapter if it is merged."""
        kind, adapter = self._kinds[name], self._export.merged
        if kind.keeps_codes:
            refuse_tiny_scales(name, layer, _FIX)
            return encode_blocks(layer, kind)
        weight = layer.dequantize()
        if adapter and name in adapter.modules:
            weight = merge(adapter, name, weight)
        return quantize_q8_0(weight)

    def _trained(self, name: str, tensor: Tensor) -> Tensor:
        """Return a dense tensor as the adapter has trained it.

        Such an adapter of llama.cpp has no tensors but LoRA matrices, so the others that were
        trained go into the base.
        """
        adapter = self._export.adapter
        if adapter is None or self._export.adapter_form == "none":
            return tensor
        module = name.removesuffix(".weight")
        if self._export.merged and module != name and module in adapter.modules:
            return merge(adapter, module, tensor.to(self._export.device, torch.float32))
        return adapter.replaced(name, tensor)
