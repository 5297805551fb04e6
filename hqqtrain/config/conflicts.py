"""Settings that cannot be combined, as data: one `Conflict` for each combination.

`RunConfig.check` reports the conflicts that the configuration alone decides. Each strategy in
`hqqtrain.distributed.strategies` lists its own conflicts, which `check_supported` reports once
`parallel.strategy=auto` is resolved.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hqqtrain.config.quant import INFERENCE_BACKENDS

PAGED_OPTIMIZERS = ("paged_adamw", "paged_adamw_8bit")


@dataclass(frozen=True)
class Conflict:
    """Values of several keys that cannot be combined.

    Attributes:
        keys: Refused values by key, such as `optim.name`. The conflict applies if every key has one
            of its values. The message begins with the first key.
        reason: Rest of the message: what is allowed, and the fix. `{optim.name}` is replaced by the
            value of that key.
    """

    keys: Mapping[str, Collection]
    reason: str


BF16_ADAPTERS_IN_FP16 = Conflict(
    {"adapter.dtype": ("bf16",), "train.precision": ("fp16",)},
    "the loss scaling of train.precision=fp16 cannot unscale bf16 gradients; use "
    "train.precision=bf16 or adapter.dtype=fp32.",
)

CONFIG_CONFLICTS = (
    Conflict(
        {"adapter.kind": ("none",), "task": ("finetune",)},
        "task=finetune trains an adapter; use lora or rslora.",
    ),
    Conflict(
        {"quant.nbits": (None,), "task": ("quantize",)},
        "task=quantize has nothing to do without quantization; choose a number of bits.",
    ),
    Conflict(
        {"quant.nbits": (None,), "task": ("export",), "export.format": ("packed",)},
        "export.format=packed writes quantized weights; use dense, or choose a number of bits.",
    ),
    Conflict(
        {"quant.backend": INFERENCE_BACKENDS, "task": ("finetune", "quantize", "export")},
        "computes products for task=generate and task=eval alone; use auto, triton or torch.",
    ),
    Conflict(
        {"quant.backend": INFERENCE_BACKENDS, "parallel.offload": ("parameters",)},
        "its layers stay on the device; use quant.backend=auto or parallel.offload=none.",
    ),
    Conflict(
        {"quant.backend": INFERENCE_BACKENDS, "quant.offload_meta": (True,)},
        "its layers stay on the device; use quant.backend=auto or quant.offload_meta=false.",
    ),
    Conflict(
        {"quant.save": (False,), "task": ("quantize",)},
        "task=quantize only serves to save quantized/; use true.",
    ),
    Conflict(
        {"eval.source": (None,), "task": ("eval",)},
        "task=eval needs a text to evaluate on; name one.",
    ),
    Conflict(
        {
            "run.resume": ("must",),
            "task": ("quantize", "eval", "export", "data", "generate", "plan"),
        },
        "task={task} makes no checkpoints; use auto.",
    ),
    Conflict(
        {"launch.backend": ("slurm",), "task": ("generate",)},
        "task=generate writes to the terminal on which it was started; use local, for example "
        "under `srun --pty`.",
    ),
    Conflict(
        {"data.streaming": (True,), "train.max_steps": (None,), "task": ("finetune",)},
        "the number of steps of train.epochs is not known before all data has been read; set "
        "train.max_steps, which the learning rate needs, too.",
    ),
    Conflict(
        {"train.on_nonfinite": ("rollback",), "ckpt.every": (None,)},
        "needs checkpoints to return to; set ckpt.every.",
    ),
    Conflict(
        {"parallel.offload": ("parameters",), "optim.name": PAGED_OPTIMIZERS},
        "the optimizer state is in host memory, where optim.name={optim.name} has nothing to page; "
        "use adamw.",
    ),
    BF16_ADAPTERS_IN_FP16,
)
"""The combinations that the configuration alone decides."""


def conflict_errors(conflicts: Iterable[Conflict], groups: Mapping[str, Any]) -> Iterator[str]:
    """Yield one message for every conflict that the settings have.

    Args:
        conflicts: The combinations to look for.
        groups: The groups of the configuration by name, and single values such as `task`.
    """
    for conflict in conflicts:
        values = {key: _value(groups, key) for key in conflict.keys}
        if all(values[key] in refused for key, refused in conflict.keys.items()):
            key, value = next(iter(values.items()))
            yield f"{key}={_as_yaml(value)}: {conflict.reason.format_map(groups)}"


def _value(groups: Mapping[str, Any], key: str) -> Any:
    group, _, name = key.partition(".")
    return getattr(groups[group], name) if name else groups[group]


def _as_yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)
