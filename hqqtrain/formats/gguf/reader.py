"""Read the layers of a GGUF file, to compare them with the model that it was made from."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hqqtrain.formats.gguf.block_types import BlockType
from hqqtrain.formats.gguf.blocks import decode_blocks
from hqqtrain.formats.gguf.conversion import Conversion
from hqqtrain.formats.gguf.package import import_gguf
from hqqtrain.formats.read_back import StoredLayer, as_linear


class GgufLayers:
    """The quantized layers of a GGUF file, in the order of rows of the checkpoint."""

    def __init__(self, path: Path, conversion: Conversion, kinds: Mapping[str, BlockType]) -> None:
        """Open the file; `kinds` are the types of blocks by module."""
        self._gguf = import_gguf()
        self._conversion, self._kinds = conversion, kinds
        self._tensors = {tensor.name: tensor for tensor in self._gguf.GGUFReader(path).tensors}

    def stored(self, module: str) -> StoredLayer:
        """Return the weight of a module as the package `gguf` computes it from its blocks."""
        blocks, kind = (
            self._blocks(module),
            self._gguf.GGMLQuantizationType[self._kinds[module].name],
        )
        weight = self._gguf.quants.dequantize(blocks.numpy(), kind)
        return StoredLayer(torch.from_numpy(weight), [blocks])

    def linear(self, module: str) -> nn.Module:
        """Return the linear that llama.cpp computes with, without a bias."""
        layer = decode_blocks(self._blocks(module), self._kinds[module])
        return as_linear(layer)

    def _blocks(self, module: str) -> Tensor:
        """Return the blocks of a module, uint8 [out_features, bytes of a row]."""
        name = f"{module}.weight"
        blocks = torch.from_numpy(self._tensors[self._conversion.name(name)].data.copy())
        order = self._conversion.order(name)
        return blocks if order is None else blocks[order.argsort()]
