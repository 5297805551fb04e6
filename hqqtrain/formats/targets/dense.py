"""Export dense weights, for any tool: dequantized, and by default with the adapter merged."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.checkpoint_format import CheckpointFormat
from hqqtrain.formats.dense import dense_tensors, untied_config
from hqqtrain.formats.layers import Tensors
from hqqtrain.formats.older_keys import with_older_keys
from hqqtrain.formats.packed import BASE_FINGERPRINT, dense_config_json
from hqqtrain.formats.quantized_settings import ModuleSettings, QuantizedSettings


class DenseFormat(CheckpointFormat):
    """A Hugging Face checkpoint in full precision, for `AutoModelForCausalLM.from_pretrained`."""

    name = "dense"
    adapter_forms = ("merge", "separate")
    holds_dense = True
    suffixes = ("weight",)

    def refusals(self, settings: QuantizedSettings, hf_config: PretrainedConfig) -> Iterator[str]:
        """Yield nothing: every model has dense weights."""
        yield from ()

    def auto_dtype(self, export: ModelExport) -> torch.dtype:
        """Return the dtype that the model computes in."""
        return export.compute_dtype

    def tensors(self, export: ModelExport, dtype: torch.dtype) -> Tensors:
        """Yield the dense tensors. Collective."""
        return dense_tensors(
            export.tensors(), export.settings, export.merged, dtype=dtype, device=export.device
        )

    def config_json(
        self, export: ModelExport, names: set[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return config.json of a dense model."""
        config = dense_config_json(untied_config(export.hf_config, dtype, names))
        if export.settings.modules and not export.merged:  # its adapters fit these weights, too
            config[BASE_FINGERPRINT] = export.settings.fingerprint
        return with_older_keys(config)

    def linear(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> nn.Module:
        """Return a dense linear."""
        weight = tensors["weight"]
        out_features, in_features = weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear

    def weight(self, tensors: Mapping[str, Tensor], settings: ModuleSettings) -> Tensor:
        """Return the weight, fp32."""
        return tensors["weight"].float()
