"""Build a model from its configuration on the meta device, without weights.

The later steps (replacing linears, adding adapters, sharding) need only shapes, so no rank ever
materializes a whole full-precision model.
"""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from hqqtrain.common.errors import UserError
from hqqtrain.compat import non_persistent_buffers
from hqqtrain.models.config_check import check_config_json, check_implementations
from hqqtrain.models.fqn import base_model, strip_wrappers
from hqqtrain.models.rope import reset_dynamic_rope
from hqqtrain.models.source import read_config_json

MAX_MODULES = 1 << 20
"""Largest number of modules of a model; a mixture of 61 layers and 256 experts has 60,000."""

MAX_BUFFER_BYTES = 1 << 33
"""Largest size of all buffers of a model, every rank of which computes them for itself."""


def load_hf_config(folder: Path) -> PretrainedConfig:
    """Load the transformers configuration of the model in `folder`, without quantization_config.

    Raises:
        UserError: config.json is missing, or transformers cannot read it.
    """
    path, config_json = folder / "config.json", read_config_json(folder)
    if "model_type" not in config_json:
        raise UserError(f"{path}: has no model_type; give the folder of a transformers model.")
    check_config_json(path, config_json)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the constructors of configurations raise anything
        raise UserError(_unreadable_message(path, config_json, error)) from error
    config.__dict__.pop("quantization_config", None)
    # The caller chooses the form of an output; every caller here wants an object with logits.
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    check_implementations(path, config)
    return config


def build_meta(hf_config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the causal LM of `hf_config` on the meta device: shapes and dtypes, no memory.

    Args:
        hf_config: Configuration of the model.
        dtype: Dtype of the parameters; None: the one in the configuration. A buffer has the dtype
            that it has in a model of this dtype.

    Raises:
        UserError: The installed transformers has no causal LM of this type, or cannot build this
            one.
    """
    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model_type={hf_config.model_type}: not a causal LM that the installed transformers "
            "can build."
        )
    config = copy.deepcopy(hf_config)  # transformers writes the dtype into it
    options = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"), _limited_modules():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    except Exception as error:  # the constructors of models raise anything for a bad configuration
        folder = hf_config.name_or_path
        where = f"{Path(folder, 'config.json')}: " if folder else ""
        raise UserError(
            f"{where}transformers cannot build model_type={hf_config.model_type} from it: "
            f"{_first_paragraph(error)}{_entries_of(hf_config, error)}"
        ) from error
    buffer_bytes = sum(buffer.nbytes for buffer in model.buffers())
    if buffer_bytes > MAX_BUFFER_BYTES:
        raise UserError(
            f"{hf_config.name_or_path}: the buffers of the model in config.json, such as tables of "
            f"positions, have {buffer_bytes / 2**30:.0f} GiB; use the config.json that was saved "
            "with the weights."
        )
    for param in model.parameters():
        if dtype is not None and param.is_floating_point():
            param.data = param.data.to(dtype)
    reset_dynamic_rope(model)
    return model


@contextmanager
def _limited_modules() -> Iterator[None]:
    """Raise if a constructor makes more than `MAX_MODULES` modules, which would fill the memory."""
    counter = itertools.count()

    def count(*_: object) -> None:
        if next(counter) > MAX_MODULES:
            raise ValueError(f"the model has more than {MAX_MODULES} modules")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def restore_buffers(model: nn.Module, device: torch.device | str) -> list[Tensor]:
    """Compute the buffers that no checkpoint contains (`inv_freq` ...) again, on `device`.

    A model that was built on meta and then materialized has no values in these buffers. Only the
    constructor of the architecture computes them, so it runs again, with parameters on meta and
    real buffers. The same holds for tensors that are plain attributes of a module. As in
    `from_pretrained`, they are computed in fp32, and rounded if the model has them in 16 bits.

    Returns:
        The tensors that have been set.
    """
    root = base_model(model)
    modules = {strip_wrappers(name): module for name, module in root.named_modules()}
    with init_empty_weights(include_buffers=False):
        reference = AutoModelForCausalLM.from_config(
            copy.deepcopy(root.config), trust_remote_code=False, dtype=torch.float32
        )
    restored = []
    for module_name, module in reference.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
        for name, value in (non_persistent_buffers(module) | plain).items():
            target = modules[module_name]
            restored.append(value.to(device, getattr(target, name).dtype))
            setattr(target, name, restored[-1])
    return restored


def _unreadable_message(path: Path, config_json: dict[str, Any], error: Exception) -> str:
    """Return the message for a config.json that transformers refuses."""
    reason = _first_paragraph(error)
    if "auto_map" in config_json:
        reason = "the model has code of its own, which is never run."
    return (
        f"{path}: model_type={config_json['model_type']} cannot be read by transformers: {reason}"
    )


def _first_paragraph(error: Exception) -> str:
    """Return the type of `error` and the first paragraph of its message, as one line."""
    text = " ".join(str(error).split("\n\n")[0].split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def _entries_of(hf_config: PretrainedConfig, error: Exception) -> str:
    """Return the entries of config.json with a value that `error` says is unknown, in brackets."""
    if not isinstance(error, KeyError) or not error.args:
        return ""
    keys = [key for key, value in hf_config.to_dict().items() if value == error.args[0]]
    return f" ({', '.join(f'{key}={error.args[0]}' for key in keys)})" if keys else ""
