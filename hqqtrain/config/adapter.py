"""The config group `adapter`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hqqtrain.config.field import is_names, key


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """The adapter that is trained on top of the frozen, quantized weights."""

    kind: str = key("lora", "type of adapter", choices=("lora", "rslora", "none"))
    r: int = key(16, "rank of the two LoRA matrices", low=1, high=1 << 20)
    alpha: float = key(
        32.0, "numerator of the scaling: alpha / r, with rslora alpha / sqrt(r)", low=0
    )
    dropout: float = key(0.0, "dropout probability on the adapter's input", low=0)
    dtype: str = key(
        "fp32",
        "dtype of adapters, their gradients and optimizer state; bf16 loses small updates",
        choices=("fp32", "bf16"),
    )
    init: str = key(
        "default",
        "initialization; default: PEFT's init_lora_weights=True, gaussian: its 'gaussian'",
        choices=("default", "gaussian"),
    )
    init_from: str | None = key(
        None, "folder of a PEFT adapter to train further, or with task=eval to measure"
    )
    target_modules: Any = key(  # list[str] | str, a union that OmegaConf does not have
        help="quantized linear layers that get an adapter, as in PEFT: names such as "
        "[q_proj,v_proj], or all-linear (all but the head); also globs",
        factory=lambda: ["*"],
    )
    modules_to_save: list[str] = key(
        help="small modules to train in full and save with the adapter, as in PEFT: names such as "
        "[norm,lm_head]; also globs",
        factory=list,
    )

    def errors(self) -> Iterator[str]:
        """Yield one message for every value that is not allowed, beyond its type and range."""
        if self.dropout >= 1:
            yield f"adapter.dropout={self.dropout}: must be below 1."
        names = self.target_modules
        names = names if isinstance(names, list) else [names]
        if not names or not is_names(names):
            shown = "null" if self.target_modules is None else self.target_modules
            yield (
                f"adapter.target_modules={shown}: must be a list of names, such as "
                "[q_proj,v_proj], or all-linear."
            )
