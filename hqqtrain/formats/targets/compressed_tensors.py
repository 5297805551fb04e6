"""Export to compressed-tensors, the format of llm-compressor and vLLM, at 8 and 4 bits.

Its zeros are integers, so only a model that was quantized with quant.zero=integer fits, and fits
exactly. Its codes are signed in memory, but stored with an offset that makes them ours.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hqqtrain.formats.checkpoint_format import QuantizedCheckpointFormat, only_axis_1
from hqqtrain.formats.fused_linears import dense_linears, differing_linears
from hqqtrain.formats.layers import PackedLayer
from hqqtrain.formats.quantized_settings import ModuleSettings, QuantizedSettings
from hqqtrain_kernels.bit_stream import pack_bit_stream, unpack_bit_stream

NBITS = (8, 4)


class CompressedTensorsFormat(QuantizedCheckpointFormat):
    """The format `pack-quantized`, asymmetric, with groups or whole rows."""

    name = "compressed-tensors"
    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    adapter_has_tensors = False  # vLLM loads no such adapter

    def refusals(self, settings: QuantizedSettings, hf_config: PretrainedConfig) -> Iterator[str]:
        """Yield why compressed-tensors cannot hold a model with these settings."""
        yield from only_axis_1(settings, "compressed-tensors")
        for name, module in settings.modules.items():
            if module.nbits not in NBITS:
                yield f"{name} has {module.nbits} bits, and compressed-tensors has 8 and 4"
                break
        for name, module in settings.modules.items():
            if module.zero != "integer":
                yield (
                    f"{name} has float zeros, and compressed-tensors has integers; quantize with "
                    "quant.zero=integer"
                )
                break
        for first, second in differing_linears(settings, hf_config):
            yield f"{first} and {second}, which vLLM and SGLang fuse, have different settings"
            break

    def encode(self, layer: PackedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the codes, the scale, the zeros packed along the rows of the weight, the shape."""
        layout = layer.layout
        zero = layer.zero.float().round().clamp(0, 2**layout.nbits - 1).to(torch.uint8)
        return {
            "weight_packed": pack_bit_stream(layer.codes, layout.nbits),
            "weight_scale": layer.scale.float(),
            "weight_zero_point": pack_bit_stream(zero.t().contiguous(), layout.nbits).t(),
            "weight_shape": torch.tensor([layout.out_features, layout.in_features]),
        }

    def decode(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> PackedLayer:
        """Return the layer."""
        layout = settings.layout
        codes = unpack_bit_stream(tensors["weight_packed"], layout.nbits, layout.in_features)
        zero_point = tensors["weight_zero_point"].t().contiguous()
        zero = unpack_bit_stream(zero_point, layout.nbits, layout.out_features).t()
        scale = tensors["weight_scale"].float()
        return PackedLayer.from_codes(codes, scale, zero.float().contiguous(), layout)

    def config(
        self, settings: QuantizedSettings, hf_config: PretrainedConfig, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return the entry `quantization_config`, with one group of layers for each setting."""
        targets: dict[tuple[int, int], list[str]] = {}
        for name, module in settings.modules.items():
            layout = module.layout
            whole_row = layout.group_size == layout.in_features
            setting = (module.nbits, 0 if whole_row else layout.group_size)
            targets.setdefault(setting, []).append(name)
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if len(targets) == 1 else names,
                "weights": _weights(*setting),
            }
            for i, (setting, names) in enumerate(targets.items())
        }
        quantization = {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "quantization_status": "compressed", "config_groups": groups,
            "ignore": dense_linears(settings, hf_config),
        }  # fmt: skip
        return {"quantization_config": quantization}


def _weights(nbits: int, group_size: int) -> dict[str, Any]:
    """Return the quantization of some layers; group size 0: whole rows."""
    return {
        "num_bits": nbits,
        "type": "int",
        "symmetric": False,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size or None,
        "dynamic": False,
    }
