"""Check at every start that packed bits survive sharding and gathering.

Packed codes viewed as floats take every bit pattern, including NaNs with payloads and denormals. A
cast, or a sum of a shard and zeros, rewrites some of them, and the model silently becomes noise
(bitsandbytes#1945; fsdp_qlora's README). So all 65,536 patterns of 16 bits are tried.
"""

import torch
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.strategies.base import Strategy, storage_dtype_name

_PATTERNS = 1 << 16

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def view_as_integers(tensor: Tensor) -> Tensor:
    """View the bits of each element as an integer of the same size, without a cast."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def check_bit_exactness(strategy: Strategy) -> None:
    """Send all 65,536 patterns of 16 bits through what `strategy` does to parameters. Collective.

    Raises:
        UserError: On every rank, if any rank gets a pattern back changed.
    """
    comm, storage = strategy.comm, strategy.storage_dtype
    wanted = all_bit_patterns(storage, comm.device)
    found = strategy.roundtrip(wanted)
    changed = int((_as_words(found) != _as_words(wanted)).sum())
    changed = max(comm.gather(changed))
    if changed:
        raise UserError(
            f"quant.storage_dtype={storage_dtype_name(storage)}: "
            f"parallel.strategy={strategy.name} changes {changed} of {wanted.nbytes // 2} 16-bit "
            f"words on this machine (torch {torch.__version__}), which would destroy packed "
            "weights; choose another quant.storage_dtype or parallel.strategy."
        )


def all_bit_patterns(storage: torch.dtype, device: torch.device) -> Tensor:
    """Return every 16-bit pattern followed by its complement, viewed as `storage`, in 512 rows."""
    words = torch.arange(_PATTERNS, device=device)
    both = torch.stack([words, words ^ 0xFFFF], 1).to(torch.int32) - 0x8000
    return both.to(torch.int16).view(512, -1).view(storage)


def _as_words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)
