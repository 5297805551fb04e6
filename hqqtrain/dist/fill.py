"""Load a materialized model from a checkpoint, so that each rank reads only the rows it needs.

HQQ needs no calibration and its groups are independent, so a sharded layer is quantized in place:
each rank reads its own rows, quantizes them and writes them into its shard, without communication.
If several ranks hold the same rows (`ddp`, or the replicas of hybrid sharding), one of them
quantizes the rows and broadcasts the result, so all ranks together still read the source once.
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
"""Elements of an unquantized tensor that are read at a time; the largest tensors have 2**31."""

ERROR_NUMBERS = 1 << 24
"""Elements dequantized at a time to measure the error: less memory than the weight itself."""


@dataclass
class Filled:
    """Result of loading, for this rank's rows.

    `squared` maps every layer to [||W - W'||^2, ||W||^2], fp64 on the device. The values of all
    ranks add up to those of the whole layer.
    """

    squared: dict[str, Tensor]
    report: LoadReport

    def relative_errors(self, processes: Processes) -> tuple[dict[str, float], float]:
        """Return ||W - W'||^2 / ||W||^2 of every layer, and of all layers together. Collective."""
        if not self.squared:
            return {}, 0.0
        sums = processes.sum(torch.cat(list(self.squared.values())).tolist())
        errors, norms = sums[::2], sums[1::2]

        def ratio(error: float, norm: float) -> float:
            return error / norm if norm else 0.0

        by_layer = {
            name: ratio(error, norm)
            for name, error, norm in zip(self.squared, errors, norms, strict=True)
        }
        return by_layer, ratio(sum(errors), sum(norms))


def fill(layers: Mapping[str, HQQLinear], dense: Mapping[str, Tensor], reader: Reader,
         processes: Processes, *, quantized: bool = False,
         on_rows: Callable[[str, str, int, Tensor], object] = lambda *_: None,
         on_layer: Callable[[str], object] = lambda _: None) -> Filled:  # fmt: skip
    """Read every tensor of the model from the checkpoint and quantize the linears. Collective.

    Args:
        layers: Quantized linears by checkpoint name, materialized, in the same order on all ranks.
        dense: Tensors that stay in full precision, likewise.
        reader: Source of the rows.
        processes: All ranks of the run.
        quantized: The checkpoint already has W_q, scale and zero, so nothing is quantized.
        on_rows: Called with (module, tensor name, first row, rows) for the packed weights that
            this rank has quantized or read. Over all ranks, each row is reported once.
        on_layer: Called with the layer's name after every quantized layer.

    Returns:
        Quantization errors and loading statistics of this rank.

    Raises:
        UserError: A weight has NaN or Inf; raised on every rank.
        RankLostError: Another rank has failed for another reason, or is gone.
    """
    start, memory = time.perf_counter(), Memory(processes.device)
    mine = {name: layer for i, (name, layer) in enumerate(layers.items())
           if _is_mine(layer.W_q, i, processes)}  # fmt: skip
    my_dense = {n: t for i, (n, t) in enumerate(dense.items()) if _is_mine(t, i, processes)}
    pieces = [*_layer_pieces(mine, quantized), *_dense_pieces(my_dense)]
    with (
        Watch(processes) as watch,
        ReadAhead(reader, pieces, processes.device, memory.look) as arriving,
    ):
        work = _Work(arriving, Finiteness(reader), processes.device, on_rows)
        for name, layer in layers.items():
            work.layer(name, layer if name in mine else None, quantized)
            on_layer(name)
            watch.check()
        for name, target in my_dense.items():
            work.dense(name, target)
            watch.check()
        work.finite.check()
    # Replicas receive their rows from the rank that has made them.
    for number, layer in enumerate(layers.values()):
        for leaf in PACKED:
            _broadcast_to_replicas(getattr(layer, leaf), number, processes)
    for number, target in enumerate(dense.values()):
        _broadcast_to_replicas(target, number, processes)
    seconds = time.perf_counter() - start
    report = memory.report(processes.rank, reader.bytes_read, arriving.seconds, seconds)
    return Filled(work.squared, report)


@dataclass
class _Work:
    """Processes the pieces in the order in which they arrive."""

    arriving: ReadAhead
    finite: Finiteness
    device: torch.device
    on_rows: Callable[[str, str, int, Tensor], object]
    squared: dict[str, Tensor] = field(default_factory=dict)

    def layer(self, name: str, layer: HQQLinear | None, quantized: bool) -> None:
        """Quantize or copy the rows of one layer.

        `layer` is None if another rank makes it; then only the error entry is created, because
        errors are summed over ranks by position.
        """
        self.squared[name] = torch.zeros(2, dtype=torch.float64, device=self.device)
        if layer is None or not _has_rows(layer.W_q):
            return
        if quantized:
            parts = {leaf: next(self.arriving) for leaf in PACKED}
        else:
            parts = self._quantize(name, layer)
        for leaf, part in parts.items():
            # A float view of W_q may contain NaN patterns, which a cast would change: copy bytes.
            target = local(getattr(layer, leaf)).view(torch.uint8)
            target.copy_(part.view(torch.uint8), non_blocking=True)
            self.on_rows(name, leaf, owned_rows(layer.W_q).start, part)

    def dense(self, name: str, target: Tensor) -> None:
        """Copy a tensor that stays in full precision."""
        first, target_rows = owned_rows(target).start, local(target)
        for rows in _dense_rows(target):
            value = next(self.arriving)
            self.finite.add(Piece(name, [rows]), ~value.isfinite().all())
            target_rows[rows.start - first : rows.stop - first] = value

    def _quantize(self, name: str, layer: HQQLinear) -> dict[str, Tensor]:
        piece = _source_rows(name, layer)
        weight = next(self.arriving)
        packed, not_finite = enqueue(weight, layer.spec, name=piece.name)
        self.finite.add(piece, not_finite)
        self.squared[name] += _squared_error(weight, packed, layer)
        return {leaf: getattr(packed, leaf) for leaf in PACKED}


def _is_mine(tensor: Tensor, number: int, processes: Processes) -> bool:
    """Whether this rank makes tensor `number`: the ranks of a replica group take turns."""
    replicas = copies(tensor, processes)
    return number % replicas.size == replicas.rank


def _has_rows(tensor: Tensor) -> bool:
    rows = owned_rows(tensor)
    return rows.start < rows.stop


def _layer_pieces(layers: Mapping[str, HQQLinear], quantized: bool) -> Iterator[Piece]:
    for name, layer in layers.items():
        if _has_rows(layer.W_q) and quantized:
            rows = owned_rows(layer.W_q)
            yield from (Piece(f"{name}.{leaf}", [rows]) for leaf in PACKED)
        elif _has_rows(layer.W_q):
            yield _source_rows(name, layer)


def _source_rows(name: str, layer: HQQLinear) -> Piece:
    """Return the rows of the source weight that this rank's rows of W_q are made from."""
    rows = owned_rows(layer.W_q)
    return Piece(f"{name}.weight", layer.layout.rows_of(rows.start, rows.stop))


def _dense_pieces(dense: Mapping[str, Tensor]) -> Iterator[Piece]:
    for name, target in dense.items():
        yield from (Piece(name, [rows]) for rows in _dense_rows(target))


def _dense_rows(target: Tensor) -> Iterator[slice]:
    """Yield this rank's rows in chunks of about `DENSE_NUMBERS` elements."""
    rows, row_size = owned_rows(target), max(1, target.shape[1:].numel())
    step = max(1, DENSE_NUMBERS // row_size)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _squared_error(weight: Tensor, packed: Quantized, layer: HQQLinear) -> Tensor:
    """Return fp64 [||W - W'||^2, ||W||^2], in chunks, so that no second dense copy is needed."""
    layout = layer.layout.slice(0, packed.scale.shape[0])
    step = max(1, ERROR_NUMBERS // layout.row_codes)
    total = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for start in range(0, layout.units, step):
        stop = min(start + step, layout.units)
        part = Quantized(packed.W_q[start:stop], packed.scale[start:stop], packed.zero[start:stop])
        approximation = dequantize(part, layout.slice(start, stop), torch.float32)
        exact = torch.cat([weight[rows] for rows in layout.rows_of(start, stop)])
        total += squared_error(exact, approximation)
    return total


def _broadcast_to_replicas(tensor: Tensor, number: int, processes: Processes) -> None:
    """Send tensor `number` from the rank that made it to its replicas. Collective among them."""
    replicas, part = copies(tensor, processes), local(tensor)
    if replicas.size > 1 and part.numel():
        processes.broadcast(part, number % replicas.size, replicas.group)
