"""Stop a run whose ranks have silently diverged from each other or whose frozen weights changed.

Other projects have trained N different adapters on N ranks (transformers#48792) and have had frozen
bits rewritten (bitsandbytes#1945), and noticed it only after the run.
"""

import logging
import time
from collections import Counter

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hqqtrain.distributed.bit_exactness import view_as_integers
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.local import is_sharded, local_tensor

logger = logging.getLogger(__name__)


class ReplicaMismatchError(RuntimeError):
    """Ranks that must agree hold different weights, or a frozen weight has changed."""


class ConsistencyChecker:
    """Compares checksums of all parameters over time and over ranks.

    A checksum is the sum of a tensor's bits as integers: exact, independent of order, and computed
    without a copy. It does not notice elements that swap places within a tensor. `seconds` and
    `checks` are the cost so far. `compares` is whether any two ranks hold the same data.

    Args:
        model: Ready to train. Creating a `ConsistencyChecker` is a collective.
        comm: All ranks of the run.

    Raises:
        ReplicaMismatchError: Ranks that must hold the same data differ already. A parameter that
            is not sharded must be the same on every rank.
    """

    def __init__(self, model: nn.Module, comm: Communicator) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # FSDP2 leaves the root unsharded after forward; reshard, or we would checksum a
                # buffer that is freed.
                module.reshard()
        named = dict(model.named_parameters())
        self._comm = comm
        self._params = named
        self._frozen = [name for name, p in named.items() if not p.requires_grad]
        self._parts = {name: _shared_part(p) for name, p in named.items()}
        self.compares = any(part is not None for part in self._parts.values())
        self._first = self._sums()
        self.seconds, self.checks = 0.0, 0
        self._raise_on_all_ranks(self._replica_mismatches(self._first))

    def check(self) -> None:
        """Compare with the first checksums and over ranks. Collective.

        Raises:
            ReplicaMismatchError: On every rank; the message names the ranks and the tensors.
        """
        start = time.perf_counter()
        sums, rank = self._sums(), self._comm.rank
        changed = [
            f"rank {rank}: {name}, which is frozen, has changed"
            for name in self._frozen
            if sums[name] != self._first[name]
        ]
        self._raise_on_all_ranks(changed + self._replica_mismatches(sums))
        self.seconds += time.perf_counter() - start
        self.checks += 1

    def report(self, seconds: float) -> None:
        """Log that all is well, and the share of `seconds` of training that the checks took."""
        logger.info(
            "%sfrozen bits are unchanged: %d checks took %.2f %% of the time",
            "ranks agree and " if self.compares else "", self.checks,
            100 * self.seconds / max(seconds, 1e-9),
        )  # fmt: skip

    def _sums(self) -> dict[str, int]:
        sums = torch.stack([_checksum(local_tensor(p)) for p in self._params.values()])
        return dict(zip(self._params, sums.tolist(), strict=True))

    def _replica_mismatches(self, sums: dict[str, int]) -> list[str]:
        """Return a message for every tensor of this rank that its replicas contradict.

        The value of most replicas counts as right; without a majority, that of the lowest rank.
        """
        shared = {name: part for name, part in self._parts.items() if part is not None}
        by_rank = self._comm.gather([(part, sums[name]) for name, part in shared.items()])
        messages = []
        for name, by_holder in zip(shared, zip(*by_rank, strict=True), strict=True):
            # Only ranks with the same part of the parameter are comparable.
            values = Counter(value for part, value in by_holder if part == shared[name])
            ((expected, count),) = values.most_common(1)
            if sums[name] != expected:
                rank = self._comm.rank
                messages.append(f"rank {rank}: {name} differs from that of {count} other ranks")
        return messages

    def _raise_on_all_ranks(self, messages: list[str]) -> None:
        found = [message for of_rank in self._comm.gather(messages) for message in of_rank]
        if found:
            more = f", and {len(found) - 3} more" if len(found) > 3 else ""
            raise ReplicaMismatchError(
                f"{'; '.join(found[:3])}{more}. The hardware, a library or the network has altered "
                "bits; do not trust what was trained since the last check."
            )


def _shared_part(param: Tensor) -> int | None:
    """Return the index of the part of `param` that this rank shares with other ranks.

    It is 0 if all ranks hold the full parameter, the shard index under hybrid sharding, and None if
    no other rank holds the same part.
    """
    if not is_sharded(param):
        return 0
    mesh = param.device_mesh if isinstance(param, DTensor) else None
    return mesh.get_local_rank(1) if mesh is not None and mesh.ndim == 2 else None


def _checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the bits as int64 []; packed codes are never read as floats.

    The tensor is viewed as int64 if its alignment allows. From a smaller integer dtype torch would
    first make an int64 copy, 8 times the size of a packed weight.
    """
    offset = tensor.storage_offset() * tensor.element_size()
    if tensor.is_contiguous() and tensor.nbytes % 8 == offset % 8 == 0:
        return tensor.view(-1).view(torch.int64).sum()
    return view_as_integers(tensor).sum(dtype=torch.int64)
