"""Stops a run whose ranks have silently come to differ, or whose frozen weights have changed.

Others have trained N different adapters on N ranks (transformers#48792) and found frozen bits
rewritten (bitsandbytes#1945), and noticed when the run was over.
"""

import logging
import time
from collections import Counter

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hqqtrain.dist.bits import as_integers
from hqqtrain.dist.processes import Processes
from hqqtrain.dist.shards import is_sharded, local

logger = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """Ranks differ where they must not, or a frozen weight is not what it was."""


class Sentinel:
    """Checksums of all parameters of `model`, ready to train, on this rank. Collective.

    A checksum is the sum of a tensor's bits as integers: exact, in any order, without a copy. What
    only changes places within a tensor escapes it. `seconds` and `checks` say what it cost,
    `compares` whether ranks hold anything in common.

    Raises DivergedError where ranks that hold the same, as all do of what is not sharded, differ
    already.
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # After a forward pass the outermost has whole parameters, in memory that goes.
                module.reshard()
        named = dict(model.named_parameters())
        self._processes = processes
        self._parameters = named
        self._frozen = [name for name, p in named.items() if not p.requires_grad]
        self._parts = {name: _part(p) for name, p in named.items()}
        self.compares = any(part is not None for part in self._parts.values())
        self._first = self._sums()
        self.seconds, self.checks = 0.0, 0
        self._agree(self._faults_over_ranks(self._first))

    def check(self) -> None:
        """Compares with the first time, and over ranks. Collective.

        Raises:
            DivergedError: on every rank, with the ranks and the tensors.
        """
        began = time.perf_counter()
        found, rank = self._sums(), self._processes.rank
        changed = [
            f"rank {rank}: {name}, which is frozen, has changed"
            for name in self._frozen
            if found[name] != self._first[name]
        ]
        self._agree(changed + self._faults_over_ranks(found))
        self.seconds += time.perf_counter() - began
        self.checks += 1

    def report(self, seconds: float) -> None:
        """Says what was found, and what it cost of a training of `seconds`."""
        logger.info(
            "%sfrozen bits are unchanged: looked %d times, %.2f %% of the time",
            "ranks agree and " if self.compares else "", self.checks,
            100 * self.seconds / max(seconds, 1e-9),
        )  # fmt: skip

    def _sums(self) -> dict[str, int]:
        sums = torch.stack([_checksum(local(p)) for p in self._parameters.values()])
        return dict(zip(self._parameters, sums.tolist(), strict=True))

    def _faults_over_ranks(self, sums: dict[str, int]) -> list[str]:
        """What this rank holds unlike most of those that hold the same; where none are most,
        unlike the lowest rank of them."""
        shared = {name: part for name, part in self._parts.items() if part is not None}
        mine = [(part, sums[name]) for name, part in shared.items()]
        faults = []
        for name, found in zip(
            shared, zip(*self._processes.gather(mine), strict=True), strict=True
        ):
            values = Counter(value for part, value in found if part == shared[name])
            ((usual, count),) = values.most_common(1)
            if sums[name] != usual:
                rank = self._processes.rank
                faults.append(f"rank {rank}: {name} differs from that of {count} other ranks")
        return faults

    def _agree(self, faults: list[str]) -> None:
        found = [fault for of_rank in self._processes.gather(faults) for fault in of_rank]
        if found:
            more = f", and {len(found) - 3} more" if len(found) > 3 else ""
            raise DivergedError(
                f"{'; '.join(found[:3])}{more}. The hardware, a library or the network has altered "
                "bits: what was trained since the last check is not to be trusted."
            )


def _part(param: Tensor) -> int | None:
    """Which part of a parameter this rank holds as others do: 0 where all hold the whole, of
    hybrid sharding's replicas the place in the shard; None where each rank's part is its own."""
    if not is_sharded(param):
        return 0
    mesh = param.device_mesh if isinstance(param, DTensor) else None
    return mesh.get_local_rank(1) if mesh is not None and mesh.ndim == 2 else None


def _checksum(tensor: Tensor) -> Tensor:
    """int64 [], of the bits; a float view of packed codes is never read as numbers.

    As integers of 64 bits where they can be seen as such: torch would make these of others, as a
    copy of 8 times the size of a packed weight.
    """
    at = tensor.storage_offset() * tensor.element_size()
    if tensor.is_contiguous() and tensor.nbytes % 8 == at % 8 == 0:
        return tensor.view(-1).view(torch.int64).sum()
    return as_integers(tensor).sum(dtype=torch.int64)
