"""LoRA on the linear layers of the base, with PEFT's own LoRA layer on top of `HQQLinear`.

PEFT provides the adapters, their names, scaling, dropout and files, so a saved adapter is a
standard PEFT adapter.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.nn.base_linears import base_linears
from hqqtrain.nn.patterns import matching_modules
from hqqtrain.nn.trained_base import (
    cast_trained_base,
    modules_to_save,
    set_tie_flag,
    trained_tokens,
)

_ALL_LINEAR = "all-linear"
"""PEFT's name for every linear layer but the head."""


class HQQLoraLinear(LoraLinear):
    """PEFT's LoRA layer on an `HQQLinear`, which has no dense weight to merge into."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge: quantizing the merged weight again would lose most of the training.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "an adapter cannot be merged into packed weights without losing most of its "
            "training; use task=export, which merges it into the dequantized weights."
        )


def target_linears(adapter: AdapterConfig, model: nn.Module) -> list[str]:
    """Return the names of the base linears of `model` that adapter.target_modules selects.

    Raises:
        UserError: One of its names or patterns matches no base linear.
    """
    names = list(base_linears(model))
    patterns = adapter.target_modules
    patterns = patterns if isinstance(patterns, list) else [patterns]
    targets: set[str] = set()
    if _ALL_LINEAR in patterns:  # as in PEFT, the head is not among them
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        targets = {name for name in names if model.get_submodule(name) is not head}
    others = [pattern for pattern in patterns if pattern != _ALL_LINEAR]
    targets |= set(matching_modules("adapter.target_modules", others, names))
    return [name for name in names if name in targets]


def lora_config(
    adapter: AdapterConfig, model: PreTrainedModel, token_ids: Sequence[int] = ()
) -> LoraConfig:
    """Build PEFT's configuration of `adapter` for the base linears of `model`.

    Args:
        adapter: The group `adapter` of the configuration.
        model: The model, with its base linears in place.
        token_ids: The ids of tokens whose embeddings are trained.

    Raises:
        UserError: A name or pattern of adapter.target_modules matches no base linear, or one of
            adapter.modules_to_save selects a module that cannot be trained.
    """
    modules = modules_to_save(adapter.modules_to_save, model) if adapter.modules_to_save else []
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT only divides it, so a float works
        lora_dropout=adapter.dropout,
        use_rslora=adapter.kind == "rslora",
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        target_modules=minimal_targets(target_linears(adapter, model), model),
        modules_to_save=modules or None,
        trainable_token_indices=trained_tokens(model, token_ids, modules) or None,
        task_type="CAUSAL_LM",
    )


def inject_adapters(model: PreTrainedModel, config: LoraConfig, targets: Sequence[str],
                    origin: str) -> PeftModel:  # fmt: skip
    """Put an adapter on every target of `model`, in place and on the meta device.

    Args:
        model: The model, without adapters.
        config: PEFT's configuration.
        targets: The full names of the modules that `config` selects.
        origin: The setting that selected them, with which a message begins.

    Raises:
        UserError: PEFT refuses a target, as it does some layers of Mamba.
    """
    if config.trainable_token_indices:
        set_tie_flag(model)
    try:
        # PEFT creates a matrix on the default device before it moves it to that of the base.
        with torch.device("meta"):
            return get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        reason = str(error)
    ends: dict[str, str] = {}  # last part of a name -> the first target that has it
    for name in targets:
        ends.setdefault(name.rpartition(".")[2], name)
    allowed = [end for end, name in ends.items() if _accepts(model, config, name)]
    refused = [end for end in ends if end not in allowed]
    advice = f"use adapter.target_modules=[{','.join(allowed)}]" if allowed else "use another model"
    raise UserError(
        f"{origin}: PEFT puts no adapter on {', '.join(refused) or 'these layers'} of "
        f"{type(model).__name__}; {advice}. PEFT says: {reason}"
    )


def _accepts(model: PreTrainedModel, config: LoraConfig, name: str) -> bool:
    """Whether PEFT puts an adapter on module `name`. It stays there: the caller gives up."""
    single = LoraConfig(r=config.r, target_modules=[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the adapters that the model has already
        try:
            with torch.device("meta"):
                inject_adapter_in_model(
                    single, model, name.replace(".", "-"), low_cpu_mem_usage=True
                )
        except ValueError:
            return False
    return True


def cast_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of all adapters to `dtype`, independently of the model's dtype."""
    cast_trained_base(model, dtype)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_A.to(dtype)
            module.lora_B.to(dtype)


def init_adapters(model: nn.Module, seed: int, kind: str,
                  write: Callable[[nn.Parameter, Tensor], Any]) -> None:  # fmt: skip
    """Initialize every LoRA matrix from the seed and its name, independently of the sharding.

    A [r, in_features] gets the Kaiming-uniform values of PEFT, or with `gaussian` normal values of
    standard deviation 1 / r. B gets zeros.

    Args:
        model: The model with adapters.
        seed: Seed of the values.
        kind: `gaussian` or `default`, as in adapter.init.
        write: Called with each parameter and its full fp32 value on the CPU.
    """
    for name, param in model.named_parameters():
        if ".lora_A." in name:
            write(param, _initial_values(param, f"{seed}:{name}", kind))
        elif ".lora_B." in name:
            write(param, torch.zeros(param.shape))


def _initial_values(param: nn.Parameter, key: str, kind: str) -> Tensor:
    """Return the initial value of a LoRA matrix A; `key` seeds its random generator."""
    # Each matrix has its own generator, so its values depend on no other matrix and on no rank.
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    values = torch.empty(param.shape)
    if kind == "gaussian":
        return values.normal_(0, 1 / param.shape[0], generator=generator)
    return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)


def minimal_targets(targets: Sequence[str], model: nn.Module) -> list[str]:
    """Return the shortest target_modules with which PEFT selects exactly `targets`.

    PEFT selects every module whose name ends in a target. The last parts of the names (`q_proj`)
    are enough, unless they select other modules, too; then the full names are returned.
    """
    last_parts = {name.rpartition(".")[2] for name in targets}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last_parts}
    return sorted(last_parts) if selected == set(targets) else sorted(targets)
