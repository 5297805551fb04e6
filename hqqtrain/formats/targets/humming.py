"""Export to humming, the kernels with float zeros of vLLM and SGLang.

humming computes (code - zero) * scale, as hqq does, from 8 bits to 1 bit. Scale and zero are kept.
vLLM and SGLang fuse some linears of a layer, which then must have the same settings.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hqqtrain.formats.checkpoint_format import QuantizedCheckpointFormat, only_axis_1
from hqqtrain.formats.fused_linears import dense_linears, differing_linears, engine_name
from hqqtrain.formats.layers import PackedLayer
from hqqtrain.formats.quantized_settings import ModuleSettings, QuantizedSettings
from hqqtrain_kernels.bit_stream import pack_bit_stream, unpack_bit_stream

MIN_GROUP_SIZE = 16


class HummingFormat(QuantizedCheckpointFormat):
    """The quant_method `humming` of vLLM and SGLang."""

    name = "humming"
    suffixes = ("weight", "weight_scale", "zero_point")
    adapter_has_tensors = False  # vLLM loads no such adapter

    def refusals(self, settings: QuantizedSettings, hf_config: PretrainedConfig) -> Iterator[str]:
        """Yield why humming cannot hold a model with these settings."""
        yield from only_axis_1(settings, "humming")
        for name, module in settings.modules.items():
            g = module.layout.group_size
            is_power_of_two = g & (g - 1) == 0
            if g < MIN_GROUP_SIZE or not (is_power_of_two or g == module.in_features):
                yield (
                    f"{name} has groups of {g}, and humming has powers of two from 16, or whole "
                    "rows"
                )
                break
        for name, module in settings.modules.items():
            if module.in_features * module.nbits % 32:
                yield (
                    f"{name} has rows of {module.in_features} x {module.nbits} bits, and humming "
                    "has multiples of 32 bits"
                )
                break
        if "lm_head" in settings.modules:
            yield "lm_head is quantized, and vLLM and SGLang keep it in full precision"
        for first, second in differing_linears(settings, hf_config):
            yield f"{first} and {second}, which vLLM and SGLang fuse, have different settings"
            break

    def encode(self, layer: PackedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the codes, scale and zero."""
        return {
            "weight": pack_bit_stream(layer.codes, layer.layout.nbits),
            "weight_scale": layer.scale.float(),
            "zero_point": layer.zero.float(),
        }

    def decode(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> PackedLayer:
        """Return the layer."""
        layout = settings.layout
        codes = unpack_bit_stream(tensors["weight"], layout.nbits, layout.in_features)
        scale, zero = tensors["weight_scale"].float(), tensors["zero_point"].float()
        return PackedLayer.from_codes(codes, scale, zero, layout)

    def config(
        self, settings: QuantizedSettings, hf_config: PretrainedConfig, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return the entry `quantization_config`, with the layers that differ as exceptions."""
        modules = {
            engine_name(name): _layer_config(module) for name, module in settings.modules.items()
        }
        first = next(iter(modules.values()))
        quantization = {
            "quant_method": "humming",
            **first,
            "has_zero_point": True,
            "is_fp_zero_point": True,
            # vLLM ignores a linear whose name contains one of these.
            "ignore": sorted({engine_name(name) for name in dense_linears(settings, hf_config)}),
        }
        # vLLM matches these at the beginning of a linear's name.
        dynamic = {
            f"+:{re.escape(name)}$": config for name, config in modules.items() if config != first
        }
        return {"quantization_config": quantization | ({"dynamic": dynamic} if dynamic else {})}


def _layer_config(module: ModuleSettings) -> dict[str, Any]:
    """Return the settings of a layer; humming has the group size 0 for a whole row."""
    g = module.layout.group_size
    size = 0 if g == module.in_features and g & (g - 1) else g
    return {"dtype": f"uint{module.nbits}", "group_size": size}
