"""Build a model from its configuration on the meta device, without weights.

The later steps (replacing linears, adding adapters, sharding) need only shapes, so no rank ever
materializes a whole full-precision model.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.compat import non_persistent_buffers
from hqqtrain.models.fqn import base_model, strip_wrappers
from hqqtrain.models.source import read_config_json


def load_hf_config(folder: Path) -> PretrainedConfig:
    """Load the transformers configuration of the model in `folder`, without quantization_config.

    Raises:
        UserError: config.json is missing, or transformers cannot read it.
    """
    path, config_json = folder / "config.json", read_config_json(folder)
    if "model_type" not in config_json:
        raise UserError(f"{path}: has no model_type; give the folder of a transformers model.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(_unreadable_message(path, config_json, error)) from error
    config.__dict__.pop("quantization_config", None)
    return config


def build_meta(hf_config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the causal LM of `hf_config` on the meta device: shapes and dtypes, no memory.

    Args:
        hf_config: Configuration of the model.
        dtype: Dtype of the parameters; None: the one in the configuration.

    Raises:
        UserError: The installed transformers has no causal LM of this type.
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
    """Compute the buffers that no checkpoint contains (`inv_freq` ...) again, on `device`.

    A model that was built on meta and then materialized has no values in these buffers. Only the
    constructor of the architecture computes them, so it runs again, with parameters on meta and
    real buffers.
    """
    root = base_model(model)
    modules = {strip_wrappers(name): module for name, module in root.named_modules()}
    with init_empty_weights(include_buffers=False):
        reference = AutoModelForCausalLM.from_config(root.config, trust_remote_code=False)
    for module_name, module in reference.named_modules():
        for buffer_name, value in non_persistent_buffers(module).items():
            setattr(modules[module_name], buffer_name, value.to(device))


def _unreadable_message(path: Path, config_json: dict[str, Any], error: Exception) -> str:
    """Return the message for a config.json that transformers refuses."""
    reason = " ".join(str(error).split("\n\n")[0].split())  # the first paragraph, as one line
    if "auto_map" in config_json:
        reason = "the model has code of its own, which is never run."
    return (
        f"{path}: model_type={config_json['model_type']} cannot be read by transformers: {reason}"
    )
