"""DeepSpeed's ZeRO-3: parameters cut flat over the ranks, gathered by hooks on the modules.

DeepSpeed is asked to cast nothing: no parameter of a packed weight may be read as a number. It is
imported here alone, late, and only for `parallel.strategy=zero3`.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from hqqtrain.dist.spread import hold_as, make_whole
from hqqtrain.dist.strategy import decoder_layers

LIVE, BUCKET = 1 << 28, 1 << 24
"""Numbers that may be whole at a time, two decoder layers of a Llama-70B at 2 bits in bf16, and
gradients that are reduced at a time. DeepSpeed's own, 10^9 and 5 * 10^8, take 2 GiB each."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW."""

_engines: dict[nn.Module, Any] = {}
"""Whose hooks a model has; a run has two models at most, to its end."""


def partition(model: nn.Module, storage: torch.dtype, device: torch.device) -> None:
    """Hands `model`, spread and filled, over to ZeRO-3, and lets it be called. Collective.

    Packed weights are held as `storage`, and whole for a decoder layer at a time.
    """
    for layer in decoder_layers(model):
        make_whole(layer)
        hold_as(layer, storage)
        cut(layer, device)
    make_whole(model)
    cut(model, device)
    _engines[model] = _deepspeed(device).initialize(model=model, config=_config())[0]


def cut(module: nn.Module, device: torch.device) -> None:
    """Each rank keeps its piece of every parameter of `module` that is not cut yet. Collective."""
    _deepspeed(device).zero.Init(module=module, config_dict_or_path=_config())


def training_engine(
    model: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None, autocast: torch.dtype
) -> Any:
    """DeepSpeed's engine over `model`, partitioned, which is called in its place. Collective.

    Args:
        max_grad_norm: to which it clips the gradient; None: never.
        autocast: of matrix products; fp32: none.
    """
    import deepspeed

    _engines.pop(model).destroy()
    config = _config() | {"gradient_clipping": max_grad_norm or 0.0}
    if autocast != torch.float32:
        name = str(autocast).removeprefix("torch.")
        # no module's parameters are to be gathered in that dtype
        modules: list[str] = []
        config["torch_autocast"] = {
            "enabled": True, "dtype": name, "lower_precision_safe_modules": modules,
        }  # fmt: skip
    _engines[model] = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return _engines[model]


def is_partitioned(param: Tensor) -> bool:
    """Whether ZeRO-3 has cut it."""
    return hasattr(param, "ds_tensor")


def trained_parts(engine: Any, param: Tensor) -> dict[str, Tensor]:
    """This rank's part of a trained parameter, "" in fp32, and of its optimizer state by key.

    Flat, all ranks' of one size: at the end of the last there may be numbers that mean nothing.
    """
    from deepspeed import utils

    parts = {"": utils.safe_get_local_fp32_param(param)}
    for key in MOMENTS if steps_taken(engine) else ():
        parts[key] = utils.safe_get_local_optimizer_state(param, key)
    return {key: part.flatten() for key, part in parts.items()}


def load_moments(engine: Any, step: int, saved: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Gives the optimizer of `engine`, which is new, the whole tensors of each parameter by key."""
    from deepspeed import utils

    zero = engine.optimizer
    for flat in zero.fp32_partitioned_groups_flat:
        moments = {key: torch.zeros_like(flat) for key in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.tensor(float(step)), **moments}
    for param, tensors in saved.items():
        size, rank = local_size(param), torch.distributed.get_rank()
        for key in MOMENTS:
            mine = tensors[key].flatten()[rank * size : (rank + 1) * size]
            mine = F.pad(mine, (0, size - mine.numel()))
            utils.safe_set_local_optimizer_state(param, mine, key)


def local_size(param: Tensor) -> int:
    """How many numbers of the parameter each rank has."""
    return param.ds_tensor.numel()  # type: ignore[attr-defined]


def steps_taken(engine: Any) -> int:
    """By the optimizer of `engine`."""
    return max((int(s["step"]) for s in engine.optimizer.optimizer.state.values()), default=0)


def gathered(param: Tensor) -> Tensor:
    """A copy of the whole parameter, on every rank. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


def _config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # accumulation is the trainer's
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": 0,  # else small ones, as adapters, stay whole
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
            "reduce_bucket_size": BUCKET,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
    }


def _deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Else it compiles an all-reduce of its own, for one CPU's processes, which is not used here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed
