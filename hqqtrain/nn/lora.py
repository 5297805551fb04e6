"""LoRA on packed linears: PEFT's own layer, told how to stand on an `HQQLinear`.

The adapters, their names, scaling, dropout and files are PEFT's, so what is saved is stock.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import AdapterConfig
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.patterns import matching_modules


class HQQLoraLinear(LoraLinear):
    """PEFT's LoRA over an `HQQLinear`, which has no dense weight to merge into."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises UserError: merged and packed again, the weight loses most of the training."""
        raise UserError(
            "an adapter cannot be merged into packed weights without losing what it learned; "
            "use task=export, which merges it into the dequantized weights."
        )


def lora_config(adapter: AdapterConfig, model: nn.Module) -> LoraConfig:
    """PEFT's configuration of `adapter` for the packed linears of `model`.

    Raises:
        UserError: a glob of adapter.target_modules matches no packed linear.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, HQQLinear)]
    targets = matching_modules("adapter.target_modules", adapter.target_modules, names)
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT divides it, as any number
        lora_dropout=adapter.dropout,
        use_rslora=adapter.kind == "rslora",
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        target_modules=_shortest(targets, model),
        task_type="CAUSAL_LM",
    )
    return register_hqq_linear(config)


def register_hqq_linear(config: LoraConfig) -> LoraConfig:
    """`config`, taught to put its adapters on `HQQLinear`; that is not saved with it."""
    config._register_custom_module({HQQLinear: HQQLoraLinear})
    return config


def cast_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives the parameters of all adapters `dtype`, whatever that of the model."""
    for module in model.modules():
        if isinstance(module, HQQLoraLinear):
            module.lora_A.to(dtype)
            module.lora_B.to(dtype)


def init_adapters(model: nn.Module, seed: int, kind: str,
                  write: Callable[[nn.Parameter, Tensor], Any]) -> None:  # fmt: skip
    """Gives every LoRA matrix its first values by its name, so that no sharding changes them.

    A [r, in]: PEFT's kaiming-uniform, or for `gaussian` normal of deviation 1 / r; B: zeros.

    Args:
        write: called with each parameter and its whole fp32 value, on the CPU.
    """
    for name, param in model.named_parameters():
        if ".lora_A." in name:
            write(param, _first_values(param, f"{seed}:{name}", kind))
        elif ".lora_B." in name:
            write(param, torch.zeros(param.shape))


def _first_values(param: nn.Parameter, key: str, kind: str) -> Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    values = torch.empty(param.shape)
    if kind == "gaussian":
        return values.normal_(0, 1 / param.shape[0], generator=generator)
    return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)


def _shortest(targets: Sequence[str], model: nn.Module) -> list[str]:
    """Last parts of the names (`q_proj`), where they mean just these modules to PEFT."""
    leaves = {name.rpartition(".")[2] for name in targets}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if meant == set(targets) else sorted(targets)
