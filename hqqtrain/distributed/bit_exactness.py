"""Check at every start that packed bits survive sharding and gathering.

Packed codes viewed as floats take every bit pattern, including NaNs with payloads and denormals. A
cast, or a sum of a shard and zeros, rewrites some of the patterns, and the model silently becomes
noise (bitsandbytes#1945; fsdp_qlora's README). Every start therefore tries all 65,536 patterns of
16 bits.
"""

import torch
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.strategies.base import Strategy, storage_dtype_name

_NUM_PATTERNS = 1 << 16
"""Number of patterns of 16 bits."""

_INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by their size in bytes."""


def view_as_integers(tensor: Tensor) -> Tensor:
    """View the bits of each element as an integer of the same size, without a cast."""
    return tensor.view(_INTEGER_DTYPES[tensor.element_size()])


def check_bit_exactness(strategy: Strategy) -> None:
    """Shard and gather all 65,536 patterns of 16 bits as `strategy` does parameters. Collective.

    Raises:
        UserError: On every rank, if any rank gets a pattern back changed.
    """
    comm, storage = strategy.comm, strategy.storage_dtype
    sent = all_bit_patterns(storage, comm.device)
    received = strategy.roundtrip(sent)
    num_changed = int((_as_words(received) != _as_words(sent)).sum())
    num_changed = max(comm.all_gather_object(num_changed))
    if num_changed:
        raise UserError(
            f"quant.storage_dtype={storage_dtype_name(storage)}: "
            f"parallel.strategy={strategy.name} changes {num_changed} of {sent.nbytes // 2} 16-bit "
            f"words on this machine (torch {torch.__version__}), which would destroy packed "
            "weights; choose another quant.storage_dtype or parallel.strategy."
        )


def all_bit_patterns(storage: torch.dtype, device: torch.device) -> Tensor:
    """Return every 16-bit pattern followed by its complement, viewed as `storage`, in 512 rows.

    An fp32 element is a pattern and its complement, so both of its halves take every pattern.
    """
    words = torch.arange(_NUM_PATTERNS, device=device)
    # Subtract 2**15, because torch has only a signed 16-bit dtype; the set of patterns is the same.
    pairs = torch.stack([words, words ^ 0xFFFF], 1).to(torch.int32) - 0x8000
    return pairs.to(torch.int16).view(512, -1).view(storage)


def _as_words(tensor: Tensor) -> Tensor:
    """View a tensor as words of 16 bits."""
    return tensor.contiguous().view(torch.int16)
