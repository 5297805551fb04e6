"""The formats that are a Hugging Face folder of safetensors files.

A format says which tensors it stores, and which weight the other program computes from them. If its
layers are quantized, it says so for one layer, and what config.json says about it. This module does
the rest, the same for all: it streams the layers, writes the folder, and reads it back to compare.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hqqtrain.common.files import atomic_write_json
from hqqtrain.formats.base import Accept, ExportFormat, ModelExport, WrittenModel, accept_all
from hqqtrain.formats.companions import companion_files, companion_modes, copy_companion_files
from hqqtrain.formats.dense import round_finite, untied_config
from hqqtrain.formats.layers import PackedLayer, Tensors, by_layer
from hqqtrain.formats.older_keys import with_older_keys
from hqqtrain.formats.packed import BASE_FINGERPRINT, dense_config_json
from hqqtrain.formats.quantized_settings import ModuleSettings, QuantizedSettings
from hqqtrain.formats.read_back import (
    StoredLayer,
    as_linear,
    compare_export,
    refuse_tiny_scales,
)
from hqqtrain.formats.separate_adapter import write_separate_adapter
from hqqtrain.formats.writer import collective_atomic_directory, write_shards
from hqqtrain.models.weights.safetensors import SafetensorsReader


class CheckpointFormat(ExportFormat):
    """A Hugging Face folder, written completely or not at all, and compared with the model.

    Attributes:
        suffixes: What follows the name of a module in the names of its tensors.
        adapter_has_tensors: Whether a separate adapter can replace tensors of the base, such as
            trained embeddings. Otherwise they are written into the base.
        keeps_dtypes: Whether all tensors keep their dtypes, whatever export.dtype says.
    """

    suffixes: ClassVar[tuple[str, ...]]
    adapter_has_tensors: ClassVar[bool] = True
    keeps_dtypes: ClassVar[bool] = False

    def auto_dtype(self, export: ModelExport) -> torch.dtype:
        """Return the dtype of export.dtype=auto: fp16 if bf16 would lose precision.

        A zero near 128, as 8 bits have it, loses up to half a step in bf16.
        """
        eight = any(module.nbits == 8 for module in export.settings.modules.values())
        return torch.float16 if eight else torch.bfloat16

    def write(self, export: ModelExport, folder: Path, accept: Accept = accept_all) -> None:
        """Write the folder, compare it with the model, and give it its name. Collective."""
        if export.adapter and export.adapter_form != "none":
            export.adapter.check_base(export.settings.fingerprint, "adapter")
        dtype = export.dtype or self.auto_dtype(export)
        companions = companion_files(export.tokenizer, export.settings_folder)
        names: set[str] = set()

        def stream() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.tensors(export, dtype):
                names.add(name)
                yield name, tensor

        comm = export.comm
        with collective_atomic_directory(folder, comm, companion_modes(companions)) as partial:
            write_shards(stream(), partial, max_bytes=export.max_shard_bytes, comm=comm)
            with comm.raise_on_all_ranks():
                if comm.is_main:
                    atomic_write_json(
                        partial / "config.json", self.config_json(export, names, dtype)
                    )
                    copy_companion_files(companions, partial)
                    if export.separate:
                        self.write_adapter(export, partial / "adapter", folder)
                    self.finish(partial, export)
            accept(self._read_back(export, partial, dtype))

    @abstractmethod
    def tensors(self, export: ModelExport, dtype: torch.dtype) -> Tensors:
        """Yield the tensors to write. Collective."""

    @abstractmethod
    def config_json(
        self, export: ModelExport, names: set[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return the content of config.json for a folder with the tensors `names`."""

    @abstractmethod
    def linear(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> nn.Module:
        """Return the linear that the other program computes with, without a bias."""

    @abstractmethod
    def weight(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> Tensor:
        """Return the weight that the other program computes with, fp32."""

    def write_adapter(self, export: ModelExport, folder: Path, base: Path) -> None:
        """Write the adapter to `folder`, which does not exist, in the form of the other program.

        Args:
            export: The model with its adapter.
            folder: The folder to create.
            base: The final folder of the exported base.
        """
        write_separate_adapter(export, folder, base, lora_alone=not self.adapter_has_tensors)

    def finish(self, folder: Path, export: ModelExport) -> None:
        """Write what else the other program needs in the folder."""

    def _read_back(self, export: ModelExport, folder: Path, dtype: torch.dtype) -> WrittenModel:
        """Compare what was written, on the main rank alone. Collective."""
        reader = SafetensorsReader(folder)
        modules = export.settings.modules

        def stored(name: str) -> dict[str, Tensor]:
            found = {s: f"{name}.{s}" for s in self.suffixes if f"{name}.{s}" in reader}
            return {s: reader.read(full).to(export.device) for s, full in found.items()}

        def read(name: str) -> StoredLayer:
            tensors = stored(name)
            return StoredLayer(self.weight(tensors, modules[name]), tensors.values())

        comparison = compare_export(export, read)
        return WrittenModel(
            self.name,
            None if self.keeps_dtypes else dtype,
            comparison,
            lambda name: self.linear(stored(name), modules[name]),
        )


class QuantizedCheckpointFormat(CheckpointFormat):
    """A checkpoint whose layers keep their few bits, in the layout of another program."""

    @abstractmethod
    def encode(self, layer: PackedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of a layer, by their suffixes.

        Args:
            layer: The layer.
            dtype: The dtype to which the caller rounds its floating-point tensors.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> PackedLayer:
        """Return what the other program computes with, in our layout and with an fp32 scale."""

    @abstractmethod
    def config(
        self, settings: QuantizedSettings, hf_config: PretrainedConfig, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return the entries of config.json that describe the quantization."""

    def tensors(self, export: ModelExport, dtype: torch.dtype) -> Tensors:
        """Yield the tensors to write. Collective."""
        for name, value in by_layer(export.tensors(), export.settings, export.device):
            if isinstance(value, PackedLayer):
                if dtype == torch.float16:
                    refuse_tiny_scales(name, value, "export with export.dtype=bf16 or fp32")
                for suffix, tensor in self.encode(value, dtype).items():
                    yield f"{name}.{suffix}", _round(f"{name}.{suffix}", tensor, dtype)
            else:
                if export.separate and not self.adapter_has_tensors:
                    value = export.separate.replaced(name, value)
                yield name, _round(name, value, dtype)

    def config_json(
        self, export: ModelExport, names: set[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return the content of config.json for a folder with the tensors `names`."""
        weights = names | {f"{name}.weight" for name in export.settings.modules}
        config = dense_config_json(untied_config(export.hf_config, dtype, weights))
        config[BASE_FINGERPRINT] = export.settings.fingerprint
        return with_older_keys(config) | self.config(export.settings, export.hf_config, dtype)

    def linear(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> nn.Module:
        """Return the linear that the other program computes with, without a bias."""
        return as_linear(self.decode(tensors, settings))

    def weight(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> Tensor:
        """Return the weight that the other program computes with, fp32."""
        return self.decode(tensors, settings).dequantize()


def _round(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return round_finite(name, tensor, dtype) if tensor.is_floating_point() else tensor


def only_axis_1(settings: QuantizedSettings, format_name: str) -> Iterator[str]:
    """Yield why a format without groups along columns cannot hold the model."""
    for name, module in settings.modules.items():
        if module.axis != 1:
            yield (
                f"{name} has groups along its columns (quant.axis=0), and {format_name} has groups "
                "along rows only"
            )
            return
