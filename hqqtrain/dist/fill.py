"""Fills a materialised model from a checkpoint, every rank reading only what it needs.

HQQ needs no calibration and its groups are independent, so a sharded layer is quantized
where it will live: each rank reads its own rows, quantizes them and writes them into its
shard, with no communication. Where several ranks hold the same (`ddp`, or the replicas of hybrid
sharding) one of them quantizes it and hands it out, so the source is still read once in all.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hqqtrain.dist.ahead import Piece, ReadAhead, Reader
from hqqtrain.dist.finite import Finiteness
from hqqtrain.dist.processes import Processes
from hqqtrain.dist.report import LoadReport, Memory
from hqqtrain.dist.shards import copies, local, owned_rows
from hqqtrain.dist.watch import Watch
from hqqtrain.nn import PACKED, HQQLinear
from hqqtrain.quant import Quantized, dequantize, enqueue, squared_error

DENSE_NUMBERS = 1 << 25
"""Of a tensor that stays in full precision, so many are read at a time; the largest have 2**31."""

ERROR_NUMBERS = 1 << 24
"""Weights dequantized at a time to measure the error: less than the weight itself takes."""


@dataclass
class Filled:
    """What filling found out, for this rank's rows.

    `squared`: ||W - W'||^2 and ||W||^2 of every layer, fp64 [2] on the device: sums, that add up
    over ranks.
    """

    squared: dict[str, Tensor]
    report: LoadReport

    def relative_errors(self, processes: Processes) -> tuple[dict[str, float], float]:
        """||W - W'||^2 / ||W||^2 of every layer and of all together. Collective."""
        if not self.squared:
            return {}, 0.0
        sums = processes.sum(torch.cat(list(self.squared.values())).tolist())
        errors, norms = sums[::2], sums[1::2]
        ratios = [_ratio(e, w) for e, w in zip(errors, norms, strict=True)]
        return dict(zip(self.squared, ratios, strict=True)), _ratio(sum(errors), sum(norms))


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
        UserError: a weight holds NaN or Inf; on every rank.
        RankLostError: another rank has failed otherwise, or is gone.
    """
    began, memory = time.perf_counter(), Memory(processes.device)
    own = {name: layer for i, (name, layer) in enumerate(layers.items())
           if _is_mine(layer.W_q, i, processes)}  # fmt: skip
    own_dense = {n: t for i, (n, t) in enumerate(dense.items()) if _is_mine(t, i, processes)}
    pieces = [*_layer_pieces(own, quantized), *_dense_pieces(own_dense)]
    with (
        Watch(processes) as watch,
        ReadAhead(reader, pieces, processes.device, memory.look) as arriving,
    ):
        work = _Work(arriving, Finiteness(reader), processes.device, on_rows)
        for name, layer in layers.items():
            work.layer(name, layer if name in own else None, quantized)
            on_layer(name)
            watch.check()
        for name, target in own_dense.items():
            work.dense(name, target)
            watch.check()
        work.finite.check()
    _share(layers, dense, processes)
    seconds = time.perf_counter() - began
    report = memory.report(processes.rank, reader.bytes_read, arriving.seconds, seconds)
    return Filled(work.squared, report)


@dataclass
class _Work:
    """What is done with the pieces as they arrive, in their order."""

    arriving: ReadAhead
    finite: Finiteness
    device: torch.device
    on_rows: Callable[[str, str, int, Tensor], object]
    squared: dict[str, Tensor] = field(default_factory=dict)

    def layer(self, name: str, layer: HQQLinear | None, quantized: bool) -> None:
        """None: that of another rank, of which only the name matters."""
        self.squared[name] = torch.zeros(2, dtype=torch.float64, device=self.device)
        if layer is None or not _has_rows(layer.W_q):
            return
        parts = self._loaded() if quantized else self._quantized(name, layer)
        for leaf, part in parts.items():
            _copy_bits(local(getattr(layer, leaf)), part)
            self.on_rows(name, leaf, owned_rows(layer.W_q).start, part)

    def dense(self, name: str, target: Tensor) -> None:
        """A tensor that stays in full precision."""
        first, target_rows = owned_rows(target).start, local(target)
        for rows in _dense_rows(target):
            value = next(self.arriving)
            self.finite.add(Piece(name, [rows]), ~value.isfinite().all())
            target_rows[rows.start - first : rows.stop - first] = value

    def _loaded(self) -> dict[str, Tensor]:
        return {leaf: next(self.arriving) for leaf in PACKED}

    def _quantized(self, name: str, layer: HQQLinear) -> dict[str, Tensor]:
        piece = _piece(name, layer)
        weight = next(self.arriving)
        made, not_finite = enqueue(weight, layer.spec, name=piece.name)
        self.finite.add(piece, not_finite)
        self.squared[name] += _squared_error(weight, made, layer)
        return {leaf: getattr(made, leaf) for leaf in PACKED}


def _is_mine(tensor: Tensor, number: int, processes: Processes) -> bool:
    """Of the ranks that hold the same part of it, one makes it; they take turns."""
    same = copies(tensor, processes)
    return number % same.size == same.rank


def _has_rows(tensor: Tensor) -> bool:
    rows = owned_rows(tensor)
    return rows.start < rows.stop


def _layer_pieces(layers: Mapping[str, HQQLinear], quantized: bool) -> Iterator[Piece]:
    for name, layer in layers.items():
        if _has_rows(layer.W_q) and quantized:
            rows = owned_rows(layer.W_q)
            yield from (Piece(f"{name}.{leaf}", [rows]) for leaf in PACKED)
        elif _has_rows(layer.W_q):
            yield _piece(name, layer)


def _piece(name: str, layer: HQQLinear) -> Piece:
    """Of the weight that is quantized, what belongs to this rank's rows of W_q."""
    rows = owned_rows(layer.W_q)
    return Piece(f"{name}.weight", layer.layout.rows_of(rows.start, rows.stop))


def _dense_pieces(dense: Mapping[str, Tensor]) -> Iterator[Piece]:
    for name, target in dense.items():
        yield from (Piece(name, [rows]) for rows in _dense_rows(target))


def _dense_rows(target: Tensor) -> Iterator[slice]:
    rows, numbers = owned_rows(target), max(1, target.shape[1:].numel())
    step = max(1, DENSE_NUMBERS // max(1, numbers))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _squared_error(weight: Tensor, made: Quantized, layer: HQQLinear) -> Tensor:
    """Of some units' rows, a part at a time, so that the dense weight is not there again."""
    layout = layer.layout.slice(0, made.scale.shape[0])
    step = max(1, ERROR_NUMBERS // layout.row_codes)
    total = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for start in range(0, layout.units, step):
        stop = min(start + step, layout.units)
        part = Quantized(made.W_q[start:stop], made.scale[start:stop], made.zero[start:stop])
        approximation = dequantize(part, layout.slice(start, stop), torch.float32)
        exact = torch.cat([weight[rows] for rows in layout.rows_of(start, stop)])
        total += squared_error(exact, approximation)
    return total


def _copy_bits(target: Tensor, value: Tensor) -> None:
    """A float view of W_q may hold NaN patterns, which a cast would change."""
    target.view(torch.uint8).copy_(value.view(torch.uint8), non_blocking=True)


def _share(layers: Mapping[str, HQQLinear], dense: Mapping[str, Tensor],
           processes: Processes) -> None:  # fmt: skip
    """Hands what one rank has made to those that hold the same. Collective."""
    for number, layer in enumerate(layers.values()):
        for leaf in PACKED:
            _hand_out(getattr(layer, leaf), number, processes)
    for number, target in enumerate(dense.values()):
        _hand_out(target, number, processes)


def _hand_out(tensor: Tensor, number: int, processes: Processes) -> None:
    same, part = copies(tensor, processes), local(tensor)
    if same.size > 1 and part.numel():
        processes.broadcast(part, number % same.size, same.group)
