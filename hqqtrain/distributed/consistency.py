"""Stop a run whose ranks have silently diverged from each other or whose frozen weights changed.

Other projects have trained N different adapters on N ranks (transformers#48792), or have rewritten
frozen bits (bitsandbytes#1945). They noticed it only after the run.
"""

import logging
import time
from collections import Counter

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hqqtrain.common.text import count
from hqqtrain.distributed.bit_exactness import view_as_integers
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.local import is_sharded, local_tensor, reshard

logger = logging.getLogger(__name__)


class ReplicaMismatchError(RuntimeError):
    """Ranks that must agree hold different weights, or a frozen weight has changed."""


class ConsistencyChecker:
    """Compares checksums of all parameters over time and over ranks.

    A checksum is the sum of a tensor's bits as integers: exact, independent of order, and computed
    without a copy. It does not notice elements that swap places within a tensor. Creating a
    `ConsistencyChecker` is a collective.

    Args:
        model: The model, ready to train.
        comm: All ranks of the run.

    Attributes:
        compares: Whether any two ranks hold the same data.
        seconds: Time that the checks have taken so far.
        checks: Number of checks so far.

    Raises:
        ReplicaMismatchError: Ranks that must hold the same data differ already. A parameter that
            is not sharded must be the same on every rank.
    """

    def __init__(self, model: nn.Module, comm: Communicator) -> None:
        reshard(model)  # otherwise we would checksum a buffer that is freed
        self._comm = comm
        self._params = dict(model.named_parameters())
        self._frozen = [name for name, p in self._params.items() if not p.requires_grad]
        shard_indices = {name: _shared_shard_index(p) for name, p in self._params.items()}
        # Parameters of which other ranks hold the same shard, with the index of that shard.
        self._shared = {name: index for name, index in shard_indices.items() if index is not None}
        self.compares = bool(self._shared)
        self._initial_checksums = self._checksums()
        self.seconds, self.checks = 0.0, 0
        self._raise_on_all_ranks(self._replica_mismatches(self._initial_checksums))

    def check(self) -> None:
        """Compare with the first checksums and over ranks. Collective.

        Raises:
            ReplicaMismatchError: On every rank; the message names the ranks and the tensors.
        """
        start = time.perf_counter()
        checksums, rank = self._checksums(), self._comm.rank
        changed = [
            f"rank {rank}: {name}, which is frozen, has changed"
            for name in self._frozen
            if checksums[name] != self._initial_checksums[name]
        ]
        self._raise_on_all_ranks(changed + self._replica_mismatches(checksums))
        self.seconds += time.perf_counter() - start
        self.checks += 1

    def report(self, seconds: float) -> None:
        """Log that no check has failed, and how much of `seconds` of training the checks took."""
        logger.info(
            "%sfrozen bits are unchanged: %s took %.2f %% of the time",
            "ranks agree and " if self.compares else "", count(self.checks, "check"),
            100 * self.seconds / max(seconds, 1e-9),
        )  # fmt: skip

    def _checksums(self) -> dict[str, int]:
        """Return the checksum of this rank's part of every parameter."""
        parts = [_checksum(local_tensor(p)) for p in self._params.values()]
        # Some parameters may be in host memory.
        checksums = torch.stack([part.to(self._comm.device) for part in parts])
        return dict(zip(self._params, checksums.tolist(), strict=True))

    def _replica_mismatches(self, checksums: dict[str, int]) -> list[str]:
        """Return a message for every tensor of this rank that its replicas contradict. Collective.

        The checksum of most replicas counts as right; without a majority, that of the lowest rank.
        """
        mine = [(index, checksums[name]) for name, index in self._shared.items()]
        by_rank = self._comm.all_gather_object(mine)  # [rank][parameter]
        by_param = zip(*by_rank, strict=True)
        messages = []
        for (name, my_index), of_ranks in zip(self._shared.items(), by_param, strict=True):
            # Only ranks with the same shard of the parameter are comparable.
            votes = Counter(checksum for index, checksum in of_ranks if index == my_index)
            ((expected, count),) = votes.most_common(1)
            if checksums[name] != expected:
                rank = self._comm.rank
                messages.append(f"rank {rank}: {name} differs from that of {count} other ranks")
        return messages

    def _raise_on_all_ranks(self, messages: list[str]) -> None:
        """Raise an error with the messages of all ranks, if there are any. Collective."""
        by_rank = self._comm.all_gather_object(messages)
        all_messages = [message for of_rank in by_rank for message in of_rank]
        if all_messages:
            more = f", and {len(all_messages) - 3} more" if len(all_messages) > 3 else ""
            raise ReplicaMismatchError(
                f"{'; '.join(all_messages[:3])}{more}. The hardware, a library or the network has "
                "altered bits; do not trust what was trained since the last check."
            )


def _shared_shard_index(param: Tensor) -> int | None:
    """Return the index of the shard of `param` that this rank and others hold.

    It is 0 if all ranks hold the full parameter, the shard index under hybrid sharding, and None if
    no other rank holds the same shard.
    """
    if not is_sharded(param):
        return 0
    mesh = param.device_mesh if isinstance(param, DTensor) else None
    return mesh.get_local_rank(1) if mesh is not None and mesh.ndim == 2 else None


def _checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the bits as int64 []; packed codes are never read as floats.

    The tensor is viewed as int64 if its size and alignment allow. Otherwise torch copies it to
    int64 before the sum, which takes 8 times the memory of a packed weight.
    """
    offset = tensor.storage_offset() * tensor.element_size()
    if tensor.is_contiguous() and tensor.nbytes % 8 == offset % 8 == 0:
        return tensor.view(-1).view(torch.int64).sum()
    return view_as_integers(tensor).sum(dtype=torch.int64)
