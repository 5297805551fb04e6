"""Models without weights: the architecture from its configuration, on the meta device.

Everything later (replacing linears, adapters, sharding) happens on shapes alone; no rank ever
holds a whole full-precision model.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import ModelConfig
from hqqtrain.models.fqn import base_model, strip_wrappers
from hqqtrain.models.source import read_config_json, resolve_source, shipped_folder


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The transformers configuration in the checkpoint's own config.json, freed of ours."""
    return load_hf_config(resolve_source(model, weights=False).path)


def load_hf_config(folder: Path) -> PretrainedConfig:
    """The transformers configuration of the model in `folder`, without quantization_config."""
    path, values = folder / "config.json", read_config_json(folder)
    if "model_type" not in values:
        raise UserError(f"{path}: has no model_type; a transformers model is needed.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(_explain(path, values, error)) from error
    config.__dict__.pop("quantization_config", None)
    return config


def shipped_config(name_or_path: str) -> PretrainedConfig | None:
    """The configuration of a well-known model, from this package: no network is needed."""
    folder = shipped_folder(name_or_path)
    return None if folder is None else load_hf_config(folder)


def build_meta(hf_config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal LM of `hf_config` on the meta device: shapes and dtypes, no memory.

    `dtype`: of its parameters; None: as the configuration says.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
            return model if dtype is None else nn.Module.to(model, dtype)
    except ValueError as error:
        raise UserError(
            f"model_type={hf_config.model_type}: not a causal LM that the installed transformers "
            f"can build ({str(error).splitlines()[0]})."
        ) from error


def restore_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Put the buffers that no checkpoint holds (`inv_freq` ...) on `device`, freshly computed.

    Meta tensors, and memory that `to_empty` left, hold nothing to move; the only source of
    these values is the architecture's own constructor. So it is run again, with its parameters
    on meta and its buffers real.
    """
    root = base_model(model)
    modules = {strip_wrappers(name): module for name, module in root.named_modules()}
    for name, twin in _with_real_buffers(root.config).named_modules():
        for leaf in twin._non_persistent_buffers_set & twin._buffers.keys():
            value = twin._buffers[leaf]
            modules[name]._buffers[leaf] = None if value is None else value.to(device)


def _with_real_buffers(hf_config: PretrainedConfig) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)


def _explain(path: Path, values: dict[str, Any], error: Exception) -> str:
    reason = " ".join(str(error).split("\n\n")[0].split())
    if "auto_map" in values:
        reason = "the model brings code of its own, which is never run."
    return f"{path}: model_type={values['model_type']} cannot be read by transformers: {reason}"
