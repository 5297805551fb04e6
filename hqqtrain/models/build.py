"""Models without weights: the architecture from its configuration, on the meta device.

Everything later (replacing linears, adapters, sharding) happens on shapes alone; no rank ever
holds a whole full-precision model.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hqqtrain.config import ModelConfig, UserError
from hqqtrain.models.names import base_model, plain_name
from hqqtrain.models.source import read_config_json, resolve_source

_CONFIGS = Path(__file__).parent / "configs"


def load_config(model: ModelConfig) -> PretrainedConfig:
    """The transformers configuration in the checkpoint's own config.json, freed of ours."""
    return config_of(resolve_source(model, weights=False).path)


def config_of(folder: Path) -> PretrainedConfig:
    """The transformers configuration of the model in `folder`, without quantization_config."""
    return _to_config(folder / "config.json", read_config_json(folder))


def shipped_config(name_or_path: str) -> PretrainedConfig | None:
    """The configuration of a well-known model, from this package: no network is needed.

    Found by the last part of the name, for repositories that mirror a model under its name.
    """
    if name_or_path == "tiny":
        return config_of(Path(__file__).parent / "tiny")
    known = {path.stem.lower(): path for path in _CONFIGS.glob("*.json")}
    path = known.get(name_or_path.rsplit("/", 1)[-1].lower())
    if path is None:
        return None
    return AutoConfig.from_pretrained(path, trust_remote_code=False)


def build_meta(hf_config: PretrainedConfig) -> PreTrainedModel:
    """The causal LM of `hf_config` on the meta device: shapes and dtypes, no memory."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
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
    modules = {plain_name(name): module for name, module in root.named_modules()}
    for name, twin in _with_real_buffers(root.config).named_modules():
        for leaf in twin._non_persistent_buffers_set & twin._buffers.keys():
            value = twin._buffers[leaf]
            modules[name]._buffers[leaf] = None if value is None else value.to(device)


def _with_real_buffers(hf_config: PretrainedConfig) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)


def _to_config(path: Path, values: dict) -> PretrainedConfig:
    values = {k: v for k, v in values.items() if k != "quantization_config"}
    model_type = values.pop("model_type", None)
    if not model_type:
        raise UserError(f"{path}: has no model_type; a transformers model is needed.")
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        code = " It brings code of its own, which is never run." if "auto_map" in values else ""
        raise UserError(
            f"{path}: model_type={model_type} is unknown to the installed transformers.{code}"
        ) from error
