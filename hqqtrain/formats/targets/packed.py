"""Export the packed base, in the form of a run's `quantized/`, with the adapter beside it."""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.checkpoint_format import QuantizedCheckpointFormat
from hqqtrain.formats.layers import PackedLayer, Tensors
from hqqtrain.formats.manifest import seal
from hqqtrain.formats.packed import cast_to_source_dtype, dense_config_json, placeholders
from hqqtrain.formats.quantized_settings import ModuleSettings, QuantizedSettings
from hqqtrain.quant.quantize import QuantizedWeight


class PackedFormat(QuantizedCheckpointFormat):
    """A folder that hqqtrain loads, and transformers after `import hqqtrain`."""

    name = "packed"
    suffixes = ("W_q", "scale", "zero")
    keeps_dtypes = True

    def refusals(self, settings: QuantizedSettings, hf_config: PretrainedConfig) -> Iterator[str]:
        """Yield nothing: it is our own format."""
        yield from ()

    def tensors(self, export: ModelExport, dtype: torch.dtype) -> Tensors:
        """Yield the tensors of the model; the dense ones have the dtype of their source."""
        packed = cast_to_source_dtype(export.tensors(), export.source_dtype)
        return chain(packed, placeholders(export.settings))

    def config_json(
        self, export: ModelExport, names: set[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return config.json with the settings of all layers."""
        config = dense_config_json(export.hf_config)
        return config | self.config(export.settings, export.hf_config, dtype)

    def config(
        self, settings: QuantizedSettings, hf_config: PretrainedConfig, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return the entry `quantization_config`."""
        return {"quantization_config": settings.quantization_config()}

    def encode(self, layer: PackedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return W_q, scale and zero."""
        return vars(layer.weight)

    def decode(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> PackedLayer:
        """Return the layer."""
        return PackedLayer(QuantizedWeight(**tensors), settings.layout)

    def finish(self, folder: Path, export: ModelExport) -> None:
        """Write the manifest, with the checksums of all files."""
        seal(folder)
