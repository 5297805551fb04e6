"""Do packed bits survive being sharded and gathered? Tried at every start, with all of them.

Held as floats, codes are any pattern there is: NaNs with payloads, denormals. Whatever casts on the
way, or sums zeros to a shard, rewrites some of them, and the model is noise without a word
(bitsandbytes#1945; fsdp_qlora's README).
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hqqtrain.config import UserError
from hqqtrain.dist import fsdp1, zero3
from hqqtrain.dist.processes import Processes
from hqqtrain.dist.strategy import ensure_process_group, storage_name

_PATTERNS = 1 << 16
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of each number as an integer of its size: a view, never a cast."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def check_bits(storage: torch.dtype, strategy: str, processes: Processes) -> None:
    """Sends all 65,536 patterns of 16 bits through what `strategy` does to parameters. Collective.

    Under `fsdp2`, `fsdp1` and `zero3` they are sharded and gathered, under `ddp` broadcast by the
    first rank.

    Raises:
        UserError: on every rank, where one pattern comes back changed on any.
    """
    wanted = patterns(storage, processes.device)
    if strategy == "ddp":
        found = wanted if processes.is_main else torch.zeros_like(wanted)
        processes.broadcast(found, 0)
    elif strategy != "single":
        found = _sharded_and_gathered(wanted, strategy, processes)
    else:
        return
    changed = int((_as_words(found) != _as_words(wanted)).sum())
    changed = max(processes.gather(changed))
    if changed:
        raise UserError(
            f"quant.storage={storage_name(storage)}: parallel.strategy={strategy} changes "
            f"{changed} of {wanted.nbytes // 2} words of 16 bits here (torch {torch.__version__}), "
            "which would destroy packed weights; choose another quant.storage or "
            "parallel.strategy."
        )


def patterns(storage: torch.dtype, device: torch.device) -> Tensor:
    """Every pattern of 16 bits, beside its complement, seen as `storage`: 512 rows."""
    words = torch.arange(_PATTERNS, device=device)
    both = torch.stack([words, words ^ 0xFFFF], 1).to(torch.int32) - 0x8000
    return both.to(torch.int16).view(512, -1).view(storage)


def _sharded_and_gathered(wanted: Tensor, strategy: str, processes: Processes) -> Tensor:
    """As the layers of a model are, one of whose parameters is trained."""
    module = nn.Linear(1, 1, device=processes.device)
    module.register_parameter("W_q", nn.Parameter(wanted.clone(), requires_grad=False))
    ensure_process_group(processes.size)
    if strategy == "fsdp1":
        return fsdp1.gathered(module, "W_q", processes.device)
    if strategy == "zero3":
        zero3.cut(module, processes.device)
        return zero3.gathered(module.get_parameter("W_q"))
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    fully_shard(module, mesh=mesh).unshard()
    return module.get_parameter("W_q").detach()


def _as_words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)
