"""DeepSpeed's ZeRO-3: flat shards of parameters, gathered by hooks on the modules.

The configuration keeps DeepSpeed from casting parameters, because packed weights are bits, not
numbers. Only this module imports DeepSpeed, lazily, for `parallel.strategy=zero3`.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from hqqtrain.distributed.strategies.row_sharding import unshard, view_packed_as
from hqqtrain.models.families.structure import decoder_layers

MAX_LIVE_NUMEL, REDUCE_BUCKET_NUMEL = 1 << 28, 1 << 24
"""Elements of parameters that may be gathered at a time, and elements of gradients per reduction.

`MAX_LIVE_NUMEL` is two decoder layers of a Llama-70B at 2 bits in bf16. DeepSpeed's defaults, 10^9 and
5 * 10^8, take 2 GiB each.
"""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's state."""

_engines: dict[nn.Module, Any] = {}
"""DeepSpeed engine whose hooks are on each model. A run has at most two models, until it ends."""


def apply_zero3(model: nn.Module, storage: torch.dtype, device: torch.device) -> None:
    """Shard `model` with ZeRO-3 so that it can be called. Collective.

    Packed weights become views of `storage`. Only one decoder layer at a time is whole on a rank.

    Args:
        model: Sharded by rows (`spread`) and loaded; changed in place.
        storage: Dtype to view W_q, scale and zero as.
        device: Device of this rank.
    """
    # Layer by layer: gather from row shards, view as floats, shard flat and free the full layer.
    for layer in decoder_layers(model):
        unshard(layer)
        view_packed_as(layer, storage)
        zero3_partition_module(layer, device)
    # Then what is outside the layers: embeddings, head, final norm.
    unshard(model)
    zero3_partition_module(model, device)
    # An engine without an optimizer installs the hooks that gather parameters in a forward pass.
    _engines[model] = _deepspeed(device).initialize(model=model, config=_config())[0]


def zero3_partition_module(module: nn.Module, device: torch.device) -> None:
    """Shard every parameter of `module` that is not sharded yet. Collective."""
    _deepspeed(device).zero.Init(module=module, config_dict_or_path=_config())


def build_deepspeed_engine(
    model: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None, autocast: torch.dtype
) -> Any:
    """Build DeepSpeed's engine for training, which the caller calls instead of `model`. Collective.

    Args:
        model: As `apply_zero3` leaves it.
        optimizer: Optimizer of the trained parameters.
        max_grad_norm: Norm to which DeepSpeed clips the gradient; None for no clipping.
        autocast: Dtype of matrix products; fp32 for no autocast.

    Returns:
        The `DeepSpeedEngine`.
    """
    import deepspeed

    # Remove the hooks of the engine without an optimizer, or parameters would be gathered twice.
    _engines.pop(model).destroy()
    config = _config() | {"gradient_clipping": max_grad_norm or 0.0}
    if autocast != torch.float32:
        name = str(autocast).removeprefix("torch.")
        # By default DeepSpeed casts the parameters of some modules before gathering them. An empty
        # list makes it autocast matrix products only, which keeps packed bits unchanged.
        modules: list[str] = []
        config["torch_autocast"] = {
            "enabled": True, "dtype": name, "lower_precision_safe_modules": modules,
        }  # fmt: skip
    _engines[model] = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return _engines[model]


def is_partitioned(param: Tensor) -> bool:
    """Whether ZeRO-3 has sharded `param`."""
    return hasattr(param, "ds_tensor")


def local_training_state(engine: Any, param: Tensor) -> dict[str, Tensor]:
    """Return this rank's shards of a trained parameter and of its optimizer state.

    Args:
        engine: From `build_deepspeed_engine`.
        param: A trained parameter of its model.

    Returns:
        The fp32 parameter under the key "", and the moments by their keys once a step was taken.
        Shards are flat and of one size on all ranks, so the last one may end with padding.
    """
    from deepspeed import utils

    parts = {"": utils.safe_get_local_fp32_param(param)}
    for key in MOMENTS if optimizer_step_count(engine) else ():
        parts[key] = utils.safe_get_local_optimizer_state(param, key)
    return {key: part.flatten() for key, part in parts.items()}


def load_moments(engine: Any, step: int, saved: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Load saved moments into the new optimizer of `engine`.

    Args:
        engine: From `build_deepspeed_engine`; its optimizer has taken no step.
        step: Steps that the saved optimizer had taken.
        saved: Full moments of each trained parameter, by key.
    """
    from deepspeed import utils

    zero = engine.optimizer
    # DeepSpeed steps on flat fp32 groups of this rank's shards. Before the first step they have no
    # state, so create it, with the step count that bias correction needs.
    for flat in zero.fp32_partitioned_groups_flat:
        moments = {key: torch.zeros_like(flat) for key in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.tensor(float(step)), **moments}
    # Then write each parameter's shard into its place in the group.
    rank = torch.distributed.get_rank()
    for param, tensors in saved.items():
        size = shard_numel(param)
        for key in MOMENTS:
            shard = tensors[key].flatten()[rank * size : (rank + 1) * size]
            shard = F.pad(shard, (0, size - shard.numel()))  # the last shards may be short
            utils.safe_set_local_optimizer_state(param, shard, key)


def shard_numel(param: Tensor) -> int:
    """Number of elements of `param` on each rank, padding included."""
    return param.ds_tensor.numel()  # type: ignore[attr-defined]


def optimizer_step_count(engine: Any) -> int:
    """Number of steps the optimizer of `engine` has taken."""
    return max((int(s["step"]) for s in engine.optimizer.optimizer.state.values()), default=0)


def gather_parameter(param: Tensor) -> Tensor:
    """Return a copy of the full parameter, on every rank. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


def _config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # the trainer accumulates gradients
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,
            # By default small parameters, such as adapters, are not sharded.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": MAX_LIVE_NUMEL,
            "stage3_max_reuse_distance": MAX_LIVE_NUMEL,
            "reduce_bucket_size": REDUCE_BUCKET_NUMEL,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,  # never
    }


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed with our settings and connect it to the process group."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # By default DeepSpeed compiles its own all-reduce for processes of one CPU: not needed here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed
