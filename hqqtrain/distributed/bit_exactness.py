"""Check at every start that packed bits survive sharding and gathering.

Packed codes viewed as floats take every bit pattern, including NaNs with payloads and denormals. A
cast, or a sum of a shard and zeros, rewrites some of them, and the model silently becomes noise
(bitsandbytes#1945; fsdp_qlora's README). So all 65,536 patterns of 16 bits are tried.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.strategies import fsdp1, zero3
from hqqtrain.distributed.strategies.base import ensure_process_group, storage_dtype_name

_PATTERNS = 1 << 16

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def view_as_integers(tensor: Tensor) -> Tensor:
    """View the bits of each element as an integer of the same size, without a cast."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def check_bit_exactness(storage: torch.dtype, strategy: str, comm: Communicator) -> None:
    """Send all 65,536 patterns of 16 bits through what `strategy` does to parameters. Collective.

    `fsdp2`, `fsdp1` and `zero3` shard and gather them, `ddp` broadcasts them from rank 0.

    Args:
        storage: Dtype that W_q is viewed as.
        strategy: A value of `parallel.strategy`, with `auto` already resolved.
        processes: All ranks of the run.

    Raises:
        UserError: On every rank, if any rank gets a pattern back changed.
    """
    wanted = all_bit_patterns(storage, comm.device)
    if strategy == "ddp":
        found = wanted if comm.is_main else torch.zeros_like(wanted)
        comm.broadcast(found, 0)
    elif strategy != "single":
        found = _sharded_and_gathered(wanted, strategy, comm)
    else:
        return
    changed = int((_as_words(found) != _as_words(wanted)).sum())
    changed = max(comm.gather(changed))
    if changed:
        raise UserError(
            f"quant.storage_dtype={storage_dtype_name(storage)}: parallel.strategy={strategy} changes "
            f"{changed} of {wanted.nbytes // 2} 16-bit words on this machine (torch "
            f"{torch.__version__}), which would destroy packed weights; choose another "
            "quant.storage_dtype or parallel.strategy."
        )


def all_bit_patterns(storage: torch.dtype, device: torch.device) -> Tensor:
    """Return every 16-bit pattern followed by its complement, viewed as `storage`, in 512 rows."""
    words = torch.arange(_PATTERNS, device=device)
    both = torch.stack([words, words ^ 0xFFFF], 1).to(torch.int32) - 0x8000
    return both.to(torch.int16).view(512, -1).view(storage)


def _sharded_and_gathered(wanted: Tensor, strategy: str, comm: Communicator) -> Tensor:
    """Shard and gather `wanted` as the frozen parameter of a layer that also has trained ones."""
    module = nn.Linear(1, 1, device=comm.device)
    module.register_parameter("W_q", nn.Parameter(wanted.clone(), requires_grad=False))
    ensure_process_group(comm.size)
    if strategy == "fsdp1":
        return fsdp1.roundtrip_fsdp1(module, "W_q", comm.device)
    if strategy == "zero3":
        zero3.zero3_partition_module(module, comm.device)
        return zero3.gather_parameter(module.get_parameter("W_q"))
    mesh = init_device_mesh(comm.device.type, (comm.size,))
    fully_shard(module, mesh=mesh).unshard()
    return module.get_parameter("W_q").detach()


def _as_words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)
