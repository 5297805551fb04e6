"""Fills a materialised model from a checkpoint, every rank reading only what it needs.

HQQ needs no calibration and its groups are independent, so a sharded layer is quantized
where it will live: each rank reads its own rows, quantizes them and writes them into its
shard, with no communication. Where ranks hold whole layers (`ddp`) each layer is quantized
by one of them and broadcast, so the source is still read once in all.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hqqtrain.config import UserError
from hqqtrain.dist.processes import Processes
from hqqtrain.dist.shards import local, owned_rows
from hqqtrain.nn import HQQLinear
from hqqtrain.quant import dequantize, quantize, squared_error

PACKED = ("W_q", "scale", "zero")


class Reader(Protocol):
    """What is needed of a checkpoint: rows of tensors, by name."""

    bytes_read: int

    def read(self, name: str, rows: list[slice] | None = None) -> Tensor: ...


@dataclass
class Filled:
    """What filling found out, for this rank's rows: sums that add up over ranks."""

    squared_error: dict[str, float] = field(default_factory=dict)
    squared_norm: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def relative_errors(self, processes: Processes) -> tuple[dict[str, float], float]:
        """||W - W'||^2 / ||W||^2 of every layer and of all together. Collective."""
        names = list(self.squared_norm)
        errors = processes.sum([self.squared_error[n] for n in names])
        norms = processes.sum([self.squared_norm[n] for n in names])
        by_layer = {n: _ratio(e, w) for n, e, w in zip(names, errors, norms, strict=True)}
        return by_layer, _ratio(sum(errors), sum(norms))


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm else 0.0


def fill(layers: Mapping[str, HQQLinear], dense: Mapping[str, Tensor], reader: Reader,
         processes: Processes, *, quantized: bool = False,
         on_rows: Callable[[str, str, int, Tensor], object] = lambda *_: None,
         on_layer: Callable[[str], object] = lambda _: None) -> Filled:  # fmt: skip
    """Reads, quantizes where asked, and writes every tensor that the checkpoint holds.

    Args:
        layers, dense: by their names in the checkpoint, in the same order on all ranks, the
            quantized linears and the tensors that stay in full precision; materialised.
        quantized: the checkpoint holds W_q, scale and zero, so nothing is quantized.
        on_rows: told (module, tensor name, first row, rows) of the packed weights this rank
            has made or read, each row once over all ranks.
        on_layer: called with its name after every quantized layer.

    Raises:
        UserError: a weight holds NaN or Inf.
    """
    began, filled = time.perf_counter(), Filled()
    make = _read if quantized else _quantize
    with processes.together():
        for index, (name, layer) in enumerate(layers.items()):
            filled.squared_error[name] = filled.squared_norm[name] = 0.0
            rows = owned_rows(layer.W_q)
            if _is_mine(layer.W_q, index, processes) and rows.start < rows.stop:
                made = make(reader, name, layer, rows, filled, processes.device)
                for tensor, value in made.items():
                    _write(getattr(layer, tensor), value)
                    on_rows(name, tensor, rows.start, value)
            on_layer(name)
        for name, target in dense.items():
            if _is_mine(target, 0, processes):
                _fill_dense(reader, name, target)
    _share_whole(layers, dense, processes)
    filled.seconds = time.perf_counter() - began
    return filled


def _is_mine(tensor: Tensor, index: int, processes: Processes) -> bool:
    """Every rank has rows of a sharded tensor; a whole one is the work of one rank."""
    return isinstance(tensor, DTensor) or index % processes.size == processes.rank


def _share_whole(layers: Mapping[str, HQQLinear], dense: Mapping[str, Tensor],
                 processes: Processes) -> None:  # fmt: skip
    """Hands what one rank has made, and is not sharded, to all others."""
    for index, layer in enumerate(layers.values()):
        if not isinstance(layer.W_q, DTensor):
            for tensor in PACKED:
                processes.broadcast(local(getattr(layer, tensor)), index % processes.size)
    for target in dense.values():
        if not isinstance(target, DTensor):
            processes.broadcast(local(target), 0)


def _quantize(reader: Reader, name: str, layer: HQQLinear, rows: slice, filled: Filled,
              device: torch.device) -> dict[str, Tensor]:  # fmt: skip
    part = layer.layout.slice(rows.start, rows.stop)
    wanted = layer.layout.rows_of(rows.start, rows.stop)
    weight = reader.read(f"{name}.weight", wanted).to(device)
    made = quantize(weight, layer.spec, name=f"{name}.weight", rows=wanted)
    errors = squared_error(weight, dequantize(made, part, torch.float32))
    filled.squared_error[name], filled.squared_norm[name] = errors
    return {"W_q": made.W_q, "scale": made.scale, "zero": made.zero}


def _read(reader: Reader, name: str, layer: HQQLinear, rows: slice, filled: Filled,
          device: torch.device) -> dict[str, Tensor]:  # fmt: skip
    return {tensor: reader.read(f"{name}.{tensor}", [rows]) for tensor in PACKED}


def _write(param: Tensor, value: Tensor) -> None:
    """Copies bits: a float view of W_q may hold NaN patterns, which a cast would change."""
    local(param).view(torch.uint8).copy_(value.view(torch.uint8))


def _fill_dense(reader: Reader, name: str, target: Tensor) -> None:
    rows = owned_rows(target) if isinstance(target, DTensor) else None
    value = reader.read(name, None if rows is None else [rows])
    bad = ~value.isfinite().reshape(len(value), -1).all(1)
    if bad.any():
        row = int(bad.nonzero()[0]) + (rows.start if rows else 0)
        raise UserError(
            f"{name}: row {row} holds NaN or Inf. The checkpoint is damaged, or overflowed when "
            "it was converted: use another."
        )
    local(target).copy_(value)
