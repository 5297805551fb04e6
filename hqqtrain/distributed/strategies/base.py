"""Choice of the parallel strategy and of the dtype of packed weights, and sharding with FSDP2."""

import importlib.util
import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from packaging.version import Version

from hqqtrain.common.errors import UserError

logger = logging.getLogger(__name__)

STORAGE_DTYPES = {
    "uint8": torch.uint8,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
"""Dtypes of `quant.storage_dtype`."""

FLAT_STRATEGIES = ("fsdp1", "zero3")
"""Strategies that shard flat memory, regardless of rows; see `spread.py`."""


def storage_dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` in `quant.storage_dtype`."""
    (name,) = (name for name, known in STORAGE_DTYPES.items() if known == dtype)
    return name


def resolve_strategy(wanted: str, world_size: int) -> str:
    """Resolve `parallel.strategy`: `auto` is `single` for one process and `fsdp2` for several.

    Returns:
        `single`, `ddp`, `fsdp2`, `fsdp1` or `zero3`.

    Raises:
        UserError: `single` with several processes, or `zero3` without DeepSpeed.
    """
    if wanted == "single" and world_size > 1:
        raise UserError(
            f"parallel.strategy=single: {world_size} processes were started; use ddp, fsdp2 "
            "or auto."
        )
    if wanted == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "parallel.strategy=zero3: needs deepspeed, which is not installed: pip install "
            "'hqqtrain[deepspeed]'. fsdp2 shards as much and needs no other package."
        )
    if wanted == "auto":
        return "single" if world_size == 1 else "fsdp2"
    return wanted


def resolve_storage_dtype(wanted: str, strategy: str, compute: torch.dtype) -> torch.dtype:
    """Resolve `quant.storage_dtype`, the dtype that W_q is viewed as.

    `auto` is uint8, but bf16 under FSDP2 before torch 2.12: FSDP2 of torch 2.11 crashes on frozen
    uint8 parameters, and the float view has the same bits. FSDP1 and ZeRO-3 view scale and zero as
    this dtype, too. Their `auto` is `compute`, because FSDP1 flattens a layer to one tensor.

    Args:
        wanted: `quant.storage_dtype`.
        strategy: A value of `parallel.strategy`, with `auto` already resolved.
        compute: Dtype of the parameters that stay in full precision.

    Raises:
        UserError: `uint8` under FSDP1, or under an FSDP2 that cannot shard it.
    """
    if strategy == "fsdp1" and wanted == "uint8":
        raise UserError(
            "quant.storage_dtype=uint8: parallel.strategy=fsdp1 flattens a decoder layer to one "
            f"tensor of {compute}; use auto (the same bits, viewed), or fsdp2."
        )
    if strategy in FLAT_STRATEGIES:
        return compute if wanted == "auto" else STORAGE_DTYPES[wanted]
    old = strategy == "fsdp2" and Version(torch.__version__) < Version("2.12")
    if wanted == "auto":
        return torch.bfloat16 if old else torch.uint8
    if wanted == "uint8" and old:
        raise UserError(
            f"quant.storage_dtype=uint8: FSDP2 of torch {torch.__version__} cannot shard uint8 "
            "parameters; use bf16 (the same bits, viewed), or torch 2.12 and newer."
        )
    return STORAGE_DTYPES[wanted]


def ensure_process_group(world_size: int) -> None:
    """Create a process group for a single process without a launcher, which FSDP2 needs, too."""
    if world_size == 1 and not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)


def resolve_replicas(hybrid: bool, strategy: str, local_sizes: Sequence[int]) -> int:
    """Return the number of replicas of the sharded model: 1, or with `hybrid` one per node.

    Args:
        hybrid: `parallel.hsdp`.
        strategy: A value of `parallel.strategy`, with `auto` already resolved.
        local_sizes: For every rank, the number of ranks on its node; 0 if the launcher did not set
            it.

    Raises:
        UserError: `hybrid` without fsdp2, or nodes of different or unknown sizes.
    """
    world_size, local_size = len(local_sizes), local_sizes[0]
    if not hybrid:
        return 1
    if strategy != "fsdp2":
        raise UserError(f"parallel.hsdp=true: needs parallel.strategy=fsdp2, not {strategy}.")
    if set(local_sizes) != {local_size} or not local_size or world_size % local_size:
        sizes = ", ".join(map(str, sorted(set(local_sizes))))
        raise UserError(
            f"parallel.hsdp=true: {world_size} ranks are not whole nodes of {sizes or 0}: start "
            "the same number on every node, with LOCAL_WORLD_SIZE set as torchrun does, or set "
            "parallel.hsdp=false."
        )
    if world_size == local_size:
        logger.warning("parallel.hsdp=true: all ranks are on one node, so nothing is replicated")
    return world_size // local_size
