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

from hqqtrain.compat import (
    disable_deepspeed_shared_memory,
    zero3_flat_parameters,
    zero3_inner_optimizer,
    zero3_shard,
)
from hqqtrain.config.conflicts import Conflict
from hqqtrain.distributed.strategies.base import (
    BITSANDBYTES_OPTIMIZERS,
    Capabilities,
    ensure_process_group,
    probe_layer,
)
from hqqtrain.distributed.strategies.row_sharding import FlatStrategy, unshard_rows, view_packed_as
from hqqtrain.models.families.structure import decoder_layers, describe_decoder_layers

logger = logging.getLogger(__name__)

MAX_LIVE_NUMEL, REDUCE_BUCKET_NUMEL = 1 << 28, 1 << 24
"""Largest number of parameter elements gathered at a time, and of gradient elements per reduction.

`MAX_LIVE_NUMEL` has room for two decoder layers of a Llama-70B whose codes of 2 bits are viewed as
bf16. DeepSpeed's defaults, 10^9 and 5 * 10^8 elements, take 2 GiB each.
"""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's state."""

_INFERENCE_ENGINE = "_deepspeed_inference_engine"
"""Attribute of a wrapped model: the DeepSpeed engine without an optimizer that gathers parameters.

`build_deepspeed_engine` replaces it by an engine with an optimizer.
"""


class ZeRO3(FlatStrategy):
    """Shards all parameters; DeepSpeed owns the gradients and the optimizer, too."""

    name = "zero3"
    supports = Capabilities(
        package="deepspeed",
        conflicts=(
            Conflict(
                {"train.precision": ("fp16",)},
                "parallel.strategy=zero3 does not support gradient scaling here; use bf16, or "
                "fsdp2.",
            ),
            Conflict(
                {"train.on_nonfinite": ("skip", "rollback")},
                "DeepSpeed steps before it reveals the gradient norm; under "
                "parallel.strategy=zero3 use stop, or fsdp2.",
            ),
            Conflict(
                {"adapter.dtype": ("bf16",)},
                "DeepSpeed keeps fp32 copies and moments of the trained parameters, so bf16 saves "
                "no memory under parallel.strategy=zero3; use fp32, or fsdp2.",
            ),
            Conflict(
                {"optim.name": BITSANDBYTES_OPTIMIZERS},
                "DeepSpeed keeps fp32 copies of the trained parameters and flat states, which "
                "cannot be saved by name; under parallel.strategy=zero3 use adamw.",
            ),
        ),
    )
    engine = "deepspeed"
    shards_adapters = True
    frees_parameters = True
    may_call_head_alone = False

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shard `model` with ZeRO-3 so that it can be called. Collective.

        Packed weights become views of `storage_dtype`. A rank holds one full decoder layer at a
        time.

        Args:
            model: Sharded by rows and loaded; changed in place.
        """
        device = self.comm.device
        logger.info("zero3: decoder layers: %s", describe_decoder_layers(model))
        # Layer by layer: gather from row shards, view as floats, shard flat, free the full layer.
        for layer in decoder_layers(model):
            unshard_rows(layer)
            view_packed_as(layer, self.storage_dtype)
            partition_parameters(layer, device)
        # Then what is outside the layers: embeddings, head, final norm.
        unshard_rows(model)
        partition_parameters(model, device)
        # An engine without an optimizer installs the hooks that gather parameters in forward.
        engine = _deepspeed(device).initialize(model=model, config=_config())[0]
        # `vars` keeps the engine out of the submodules: it is a module that contains `model`.
        vars(model)[_INFERENCE_ENGINE] = engine
        return model

    def roundtrip(self, weight: Tensor) -> Tensor:
        """Return `weight` after ZeRO-3 has sharded and gathered it. Collective."""
        ensure_process_group(self.comm.size)
        module = probe_layer(weight)
        partition_parameters(module, self.comm.device)
        return gather_parameter(module.get_parameter("W_q"))

    def gathered_bytes(self, world_size: int, *, root: int, layers: int, itemsize: int) -> int:
        """Add the decoder layers that are gathered at a time, and a bucket of fp32 gradients."""
        gathered = super().gathered_bytes(world_size, root=root, layers=layers, itemsize=itemsize)
        return gathered + min(MAX_LIVE_NUMEL * itemsize, layers) + REDUCE_BUCKET_NUMEL * 4


def build_deepspeed_engine(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    max_grad_norm: float | None,
    autocast: torch.dtype,
) -> Any:
    """Build DeepSpeed's engine for training, to call instead of `model`. Collective.

    Args:
        model: As `ZeRO3.wrap` returns it.
        optimizer: Optimizer of the trained parameters.
        max_grad_norm: Norm to which DeepSpeed clips the gradient; None for no clipping.
        autocast: Dtype of matrix products; fp32 for no autocast.

    Returns:
        The `DeepSpeedEngine`.
    """
    import deepspeed

    # Remove the hooks of the engine without an optimizer, or parameters would be gathered twice.
    vars(model).pop(_INFERENCE_ENGINE).destroy()
    config = _config() | {"gradient_clipping": max_grad_norm or 0.0}
    if autocast != torch.float32:
        # By default DeepSpeed casts the parameters of some modules before gathering them. An
        # empty list makes it autocast matrix products only, which keeps packed bits unchanged.
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": str(autocast).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def partition_parameters(module: nn.Module, device: torch.device) -> None:
    """Shard every parameter of `module` that is not sharded yet. Collective."""
    _deepspeed(device).zero.Init(module=module, config_dict_or_path=_config())


def is_partitioned(param: Tensor) -> bool:
    """Whether ZeRO-3 has sharded `param`."""
    return zero3_shard(param) is not None


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

    # DeepSpeed steps on flat fp32 tensors, each of which holds many of this rank's shards. Before
    # the first step they have no state, so create it, with the step count for bias correction.
    state = zero3_inner_optimizer(engine).state
    for flat in zero3_flat_parameters(engine):
        moments = {key: torch.zeros_like(flat) for key in MOMENTS}
        state[flat] = {"step": torch.tensor(float(step)), **moments}
    # Then write each parameter's shard into its place in the flat tensor.
    rank = torch.distributed.get_rank()
    for param, tensors in saved.items():
        size = shard_numel(param)
        for key in MOMENTS:
            shard = tensors[key].flatten()[rank * size : (rank + 1) * size]
            shard = F.pad(shard, (0, size - shard.numel()))  # the last shards may be short
            utils.safe_set_local_optimizer_state(param, shard, key)


def shard_numel(param: Tensor) -> int:
    """Number of elements of `param` on each rank, padding included."""
    shard = zero3_shard(param)
    assert shard is not None
    return shard.numel()


def optimizer_step_count(engine: Any) -> int:
    """Number of steps the optimizer of `engine` has taken."""
    states = zero3_inner_optimizer(engine).state.values()
    return max((int(state["step"]) for state in states), default=0)


def gather_parameter(param: Tensor) -> Tensor:
    """Return a copy of the full parameter, on every rank. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


def set_parameter(param: Tensor, full: Tensor) -> None:
    """Overwrite a parameter with the value `full` of rank 0. Collective.

    The optimizer keeps its own copy, so a later step would undo it.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters([param], modifier_rank=0), torch.no_grad():
        param.copy_(full)


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
    disable_deepspeed_shared_memory(deepspeed)
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed
