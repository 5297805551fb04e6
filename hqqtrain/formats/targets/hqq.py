"""Export to hqq 0.2.8, in the safetensors form that transformers up to 4.57 loads.

hqq packs distant groups of a weight into one byte, and stores the settings of a layer as tensors
beside its weight. The codes, scale and zero are kept.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hqqtrain.common.files import atomic_write_json
from hqqtrain.common.reading import load_json
from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.checkpoint_format import QuantizedCheckpointFormat
from hqqtrain.formats.fused_linears import dense_linears
from hqqtrain.formats.layers import PackedLayer
from hqqtrain.formats.quantized_settings import ModuleSettings, QuantizedSettings
from hqqtrain.models.foreign.hqq import PACKING_NAMES
from hqqtrain.quant.quantize import QuantizedWeight
from hqqtrain_kernels.convert import HQQ_PACKINGS, from_hqq, to_hqq


class HqqFormat(QuantizedCheckpointFormat):
    """The state dict of hqq's `HQQLinear`, with all values as tensors."""

    name = "hqq"
    suffixes = ("W_q", "scale", "zero")

    def refusals(self, settings: QuantizedSettings, hf_config: PretrainedConfig) -> Iterator[str]:
        """Yield why hqq cannot hold a model with these settings."""
        for name, module in settings.modules.items():
            layout, fields = module.layout, HQQ_PACKINGS[module.nbits][1]
            rows = layout.units * layout.groups if module.axis else layout.group_size
            if module.nbits != 3 and rows % fields:
                yield (
                    f"{name} has {rows} groups or codes in a group, of which hqq packs {fields} "
                    f"into one byte at {module.nbits} bits"
                )
                return

    def auto_dtype(self, export: ModelExport) -> torch.dtype:
        """Return the dtype of scale and zero, in which hqq computes; fp32 if there are several."""
        dtypes = {module.spec.meta_dtype for module in export.settings.modules.values()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def encode(self, layer: PackedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the 19 entries of hqq's state dict, without the bias."""
        layout = layer.layout
        scale, zero = layer.scale.float(), layer.zero.float()
        W_q, scale, zero = to_hqq(layer.weight.W_q, scale, zero, layout)
        view = "torch.int32" if layout.nbits == 3 else "torch.uint8"
        values: dict[str, bool | int | str | list[int]] = {
            "nbits": layout.nbits, "group_size": layout.group_size, "axis": layout.axis,
            "shape": [layout.out_features, layout.in_features],
            "packing": PACKING_NAMES[layout.nbits], "unpack_view_dtype": view,
            "compute_dtype": str(dtype), "view_as_float": False, "quant_scale": False,
            "quant_zero": False, "offload_meta": False, "encoded_state_dict": True,
            "stores_quant_config": True, "channel_wise": True, "optimize": True,
            "round_zero": layout.nbits == 4,
        }  # fmt: skip
        tensors = {key: _as_tensor(value) for key, value in values.items()}
        return {"W_q": W_q, "scale": scale, "zero": zero, **tensors}

    def decode(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> PackedLayer:
        """Return the layer."""
        layout = settings.layout
        weight = from_hqq(tensors["W_q"], tensors["scale"].float(), tensors["zero"].float(), layout)
        return PackedLayer(QuantizedWeight(*weight), layout)

    def config(
        self, settings: QuantizedSettings, hf_config: PretrainedConfig, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return the entry `quantization_config`; the settings of each layer are in the tensors."""
        first = next(iter(settings.modules.values()))
        weight = {
            "nbits": first.nbits, "group_size": first.layout.group_size, "axis": first.axis,
            "channel_wise": True, "optimize": True, "round_zero": first.nbits == 4,
            "view_as_float": False,
        }  # fmt: skip
        quant_config = {
            "weight_quant_params": weight, "scale_quant_params": None, "zero_quant_params": None,
            "offload_meta": False,
        }  # fmt: skip
        quantization = {
            "quant_method": "hqq", "quant_config": quant_config,
            "skip_modules": dense_linears(settings, hf_config),
        }  # fmt: skip
        return {"quantization_config": quantization}

    def finish(self, folder: Path, export: ModelExport) -> None:
        """Name a class of tokenizer that transformers 4 knows."""
        path = folder / "tokenizer_config.json"
        if path.is_file():
            config = load_json(path)
            if config.get("tokenizer_class") == "TokenizersBackend":
                atomic_write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _as_tensor(value: bool | int | str | list[int]) -> Tensor:
    """Return a value in hqq's encoding, which safetensors can hold (`encode_safetensor_type`)."""
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    return torch.tensor(value)
