"""The input of an export format.

It is a module of its own, because the registry imports the writers, and every writer needs it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.formats.peft import Adapter
from hqqtrain.formats.quantized_settings import QuantizedSettings


@dataclass(frozen=True, kw_only=True)
class ModelExport:
    """A quantized model to write, which may be sharded.

    Attributes:
        model: The loaded model, with or without adapters.
        settings: The settings of its quantized layers.
        hf_config: Its configuration.
        tokenizer: The folder from which to copy the tokenizer and generation settings.
        source_dtype: Returns the dtype of a tensor in the source, or None if the source lacks it.
        adapter: The adapter that belongs to the model, if any.
        adapter_folder: Its folder.
        dtype: The dtype of dense weights.
        device: The device on which to dequantize and merge.
        comm: The ranks that write together.
    """

    model: nn.Module
    settings: QuantizedSettings
    hf_config: PretrainedConfig
    tokenizer: Path
    source_dtype: Callable[[str], torch.dtype | None]
    adapter: Adapter | None = None
    adapter_folder: Path | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    comm: Communicator = SINGLE_PROCESS
