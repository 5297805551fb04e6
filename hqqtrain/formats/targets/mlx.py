"""Export to MLX, for Apple's machines: `mlx_lm.load("export")`.

MLX computes scale * code + bias, so the bias is -zero * scale. It is rounded once, to the dtype of
the scale. The codes are the same.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hqqtrain.common.files import atomic_write_json
from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.checkpoint_format import QuantizedCheckpointFormat, only_axis_1
from hqqtrain.formats.layers import PackedLayer
from hqqtrain.formats.peft import Adapter
from hqqtrain.formats.quantized_settings import ModuleSettings, QuantizedSettings
from hqqtrain.formats.writer import save_tensors
from hqqtrain_kernels import Layout
from hqqtrain_kernels.bit_stream import pack_bit_stream, unpack_bit_stream

GROUP_SIZES = (128, 64, 32)
"""The sizes of groups that MLX has kernels for."""


class MlxFormat(QuantizedCheckpointFormat):
    """MLX's affine quantization."""

    name = "mlx"
    suffixes = ("weight", "scales", "biases")
    adapter_has_tensors: ClassVar[bool] = False

    def refusals(self, settings: QuantizedSettings, hf_config: PretrainedConfig) -> Iterator[str]:
        """Yield why MLX cannot hold a model with these settings."""
        yield from only_axis_1(settings, "MLX")
        for name, module in settings.modules.items():
            if module.axis == 1 and module.layout.group_size % GROUP_SIZES[-1]:
                yield (
                    f"{name} has groups of {module.layout.group_size}, and MLX has multiples of 32"
                )
                return

    def auto_dtype(self, export: ModelExport) -> torch.dtype:
        """Return fp16: bf16 would round scale and bias a hundred times coarser (KL 3e-4)."""
        return torch.float16

    def encode(self, layer: PackedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the codes, and the scale and bias of MLX's groups."""
        scale, zero = layer.scale.float(), layer.zero.float()
        repeats = layer.layout.group_size // _group_size(layer.layout)
        return {
            "weight": pack_bit_stream(layer.codes, layer.layout.nbits).view(torch.uint32),
            "scales": scale.repeat_interleave(repeats, 1),
            "biases": (-zero * scale).repeat_interleave(repeats, 1),
        }

    def decode(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> PackedLayer:
        """Return the layer with zero = -bias / scale."""
        layout = settings.layout
        layout = Layout(
            layout.out_features, layout.in_features, layout.nbits, _group_size(layout), 1
        )
        codes = unpack_bit_stream(
            tensors["weight"].view(torch.int32), layout.nbits, layout.in_features
        )
        scale = tensors["scales"].float()
        zero = torch.where(scale == 0, 0, -tensors["biases"].float() / scale)
        return PackedLayer.from_codes(codes, scale, zero, layout)

    def config(
        self, settings: QuantizedSettings, hf_config: PretrainedConfig, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return the entry `quantization`, with the settings of every layer."""
        modules = {
            name: {"group_size": _group_size(module.layout), "bits": module.nbits}
            for name, module in settings.modules.items()
        }
        first = next(iter(modules.values()))
        quantization = {**first, "mode": "affine", **modules}
        return {"quantization": quantization, "quantization_config": quantization}

    def write_adapter(self, export: ModelExport, folder: Path, base: Path) -> None:
        """Write adapters.safetensors and adapter_config.json, as `mlx_lm.load` reads them."""
        assert export.adapter is not None
        adapter, config = export.adapter, export.hf_config.get_text_config()
        rank = max(len(adapter.matrix(module, "A")) for module in adapter.modules)
        folder.mkdir()
        save_tensors(_mlx_matrices(adapter, rank), folder / "adapters.safetensors")
        keys = sorted({module.split(".layers.")[1].split(".", 1)[1] for module in adapter.modules})
        parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
        atomic_write_json(folder / "adapter_config.json", {
            "fine_tune_type": "lora", "num_layers": config.num_hidden_layers,
            "lora_parameters": parameters, "model": str(base),
        })  # fmt: skip


def _group_size(layout: Layout) -> int:
    """Return the size of MLX's groups: the largest that divides ours."""
    return next(size for size in GROUP_SIZES if layout.group_size % size == 0)


def _mlx_matrices(adapter: Adapter, rank: int) -> dict[str, Tensor]:
    """Return `lora_a` [in, rank] and `lora_b` [rank, out] of each module.

    MLX has one rank and one scale for all modules. Smaller ranks are padded with zeros, and the
    scale of each module is a factor of its B.
    """
    tensors = {}
    for module in adapter.modules:
        A, B = adapter.matrix(module, "A"), adapter.matrix(module, "B")
        padding = rank - len(A)
        A = torch.nn.functional.pad(A, (0, 0, 0, padding))
        B = torch.nn.functional.pad(adapter.scaling(module) * B, (0, padding))
        tensors[f"{module}.lora_a"] = A.t().contiguous()
        tensors[f"{module}.lora_b"] = B.t().contiguous()
    return tensors
