"""Pieces of tensors that are cut over the ranks, brought to the first rank to be saved.

One collective for many tensors, where gathering each by itself would take as many as a large
model's adapter has, thousands. Only the first rank ever holds what is whole.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hqqtrain.dist import zero3
from hqqtrain.dist.processes import Processes

CHUNK = 1 << 27
"""Bytes that the first rank receives at a time, of all ranks together."""


class Piece(NamedTuple):
    """This rank's `part` of a tensor, which the parts of `owners` make in that order, end to end.

    `shape`: of the whole tensor; None where the parts mean nothing together.
    """

    part: Tensor
    shape: torch.Size | None
    owners: tuple[int, ...]


def piece_of(param: Tensor, part: Tensor, shape: torch.Size | None = None) -> Piece:
    """`part`, which belongs to this rank's part of `param`, as its gradient does."""
    if zero3.is_partitioned(param):
        owners = tuple(range(dist.get_world_size()))
    elif isinstance(param, DTensor):  # of replicas the first
        mesh = param.device_mesh.mesh
        owners = tuple(mesh.reshape(-1, mesh.shape[-1])[0].tolist())
    else:
        owners = (0,)
    return Piece(part, shape, owners)


def place_of(param: Tensor) -> tuple[int, int]:
    """(which part of `param` this rank has, counted from 0; of how many)."""
    if zero3.is_partitioned(param):
        return dist.get_rank(), dist.get_world_size()
    if isinstance(param, DTensor):
        last = param.device_mesh.ndim - 1
        return param.device_mesh.get_local_rank(last), param.device_mesh.size(last)
    return 0, 1


def gathered_pieces(
    pieces: Sequence[Piece], processes: Processes
) -> Iterator[tuple[int, list[Tensor]]]:
    """On the first rank (number, the parts of all owners) of each piece; nothing on the others.

    Parts come as they are on their ranks, in memory that is used again for the next. Every rank
    gives the same pieces in the same order. Collective.
    """
    numbers = [n for n, piece in enumerate(pieces) if piece.owners == (0,)]
    if processes.is_main:
        for number in numbers:
            yield number, [pieces[number].part]
    cut = [n for n, piece in enumerate(pieces) if piece.owners != (0,)]
    if not cut:
        return
    parts = [pieces[number].part.detach() for number in cut]
    facts = processes.gather([(part.dtype, part.shape) for part in parts])  # by rank
    for chunk in _chunks(facts):
        found = _exchange([parts[n] for n in chunk], [[f[n] for n in chunk] for f in facts],
                          processes)  # fmt: skip
        for place, n in enumerate(chunk if found else ()):
            number = cut[n]
            yield number, [found[rank][place] for rank in pieces[number].owners]


Facts = list[tuple[torch.dtype, torch.Size]]


def _chunks(facts: list[Facts]) -> Iterator[list[int]]:
    """Runs of pieces that together have CHUNK bytes, or a little more, on all ranks."""
    chunk: list[int] = []
    size = 0
    for number in range(len(facts[0])):
        chunk.append(number)
        size += len(facts) * max(_room(of_rank[number]) for of_rank in facts)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _exchange(parts: list[Tensor], facts: list[Facts], processes: Processes) -> list[list[Tensor]]:
    """On the first rank the parts of every rank, else nothing. Collective."""
    room = max(sum(map(_room, of_rank)) for of_rank in facts)
    mine = torch.empty(room, dtype=torch.uint8, device=processes.device)
    for part, there in zip(parts, _views(mine, facts[processes.rank]), strict=True):
        there.copy_(part)
    sent = [torch.empty_like(mine) for _ in facts] if processes.is_main else None
    dist.gather(mine, sent)
    return [list(_views(*pair)) for pair in zip(sent, facts, strict=True)] if sent else []


def _views(buffer: Tensor, facts: Facts) -> Iterator[Tensor]:
    at = 0
    for dtype, shape in facts:
        size = shape.numel() * dtype.itemsize
        yield buffer[at : at + size].view(dtype).view(shape)
        at += _room((dtype, shape))


def _room(fact: tuple[torch.dtype, torch.Size]) -> int:
    """Bytes of a part, with those that bring the next one to where any dtype may begin."""
    return -(-fact[1].numel() * fact[0].itemsize // 16) * 16
