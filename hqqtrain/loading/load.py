"""Load the weights of a model: every rank reads, and quantizes, only the rows it owns.

HQQ needs no calibration and its groups are independent. Each rank can therefore read its own rows,
quantize them and write them into its shard, without communication. If several ranks hold the same
rows (`ddp`, or the replicas of hybrid sharding), one of them quantizes the rows and broadcasts the
result, so each row of the source is read only once.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.heartbeat import Heartbeat
from hqqtrain.distributed.local import local_rows, local_tensor, materialize, replica_group
from hqqtrain.loading.filled_check import check_filled
from hqqtrain.loading.finite_check import DeferredFiniteCheck
from hqqtrain.loading.prefetch import Prefetcher, RowRange
from hqqtrain.loading.stats import LoadStats, MemoryTracker
from hqqtrain.models.build import restore_buffers
from hqqtrain.models.fqn import base_tensors, is_packed, retie_weights
from hqqtrain.models.weights.base import WeightSource
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear
from hqqtrain.quant.error import error_ratio, squared_error
from hqqtrain.quant.quantize import (
    QuantizedWeight,
    dequantize_weight,
    quantize_async,
)

DENSE_CHUNK_NUMEL = 1 << 25
"""Elements of a dense tensor that are read at a time, to bound memory; some tensors have 2**31."""

ERROR_CHUNK_NUMEL = 1 << 24
"""Elements that are dequantized at a time to measure the error, fewer than a weight has."""


@dataclass
class LoadResult:
    """Result of loading, for this rank's rows.

    Attributes:
        squared_errors: Layer name -> [||W - W'||^2, ||W||^2], fp64 on the device. The sums over all
            ranks are the values of the full layer.
        stats: Loading statistics of this rank.
    """

    squared_errors: dict[str, Tensor]
    stats: LoadStats

    def relative_errors(self, comm: Communicator) -> tuple[dict[str, float], float]:
        """Return ||W - W'||^2 / ||W||^2 of every layer, and of all layers together. Collective."""
        if not self.squared_errors:
            return {}, 0.0
        sums = comm.all_reduce_sum(torch.cat(list(self.squared_errors.values())).tolist())
        errors, norms = sums[::2], sums[1::2]
        by_layer = {
            name: error_ratio(error, norm)
            for name, error, norm in zip(self.squared_errors, errors, norms, strict=True)
        }
        return by_layer, error_ratio(sum(errors), sum(norms))


def load_weights(layers: Mapping[str, HQQLinear], dense: Mapping[str, Tensor], reader: WeightSource,
         comm: Communicator, *, quantized: bool = False,
         on_packed_rows: Callable[[str, str, int, Tensor], object] = lambda *_: None,
         on_layer: Callable[[str], object] = lambda _: None) -> LoadResult:  # fmt: skip
    """Read every tensor of the model from the checkpoint and quantize the linears. Collective.

    Args:
        layers: Quantized linears by checkpoint name, materialized, in the same order on all ranks.
        dense: Tensors that are not quantized, by checkpoint name, in the same order on all ranks.
        reader: Source of the rows.
        comm: All ranks of the run.
        quantized: Whether the source already has W_q, scale and zero, so nothing is quantized.
        on_packed_rows: Called with (module, tensor name, first row, rows) for the packed weights
            that this rank has quantized or read. Over all ranks, each row is reported once.
        on_layer: Called with the name of each quantized layer when it is loaded.

    Returns:
        Quantization errors and loading statistics of this rank.

    Raises:
        UserError: A weight has NaN or Inf. Raised on every rank.
        RankLostError: Another rank has failed for another reason, or is gone.
    """
    start, memory = time.perf_counter(), MemoryTracker(comm.device)
    my_layers = {name: layer for i, (name, layer) in enumerate(layers.items())
                 if _is_mine(layer.W_q, i, comm)}  # fmt: skip
    my_dense = {n: t for i, (n, t) in enumerate(dense.items()) if _is_mine(t, i, comm)}
    row_ranges = [*_layer_row_ranges(my_layers, quantized), *_dense_row_ranges(my_dense)]
    with (
        Heartbeat(comm) as heartbeat,
        Prefetcher(reader, row_ranges, comm.device, memory.sample) as prefetcher,
    ):
        finite_check = DeferredFiniteCheck(reader)
        loader = _RowLoader(prefetcher, finite_check, comm.device, on_packed_rows)
        # Load in the order of `row_ranges`, because each load takes the next rows of `prefetcher`.
        for name, layer in layers.items():
            loader.load_layer(name, layer if name in my_layers else None, quantized)
            on_layer(name)
            heartbeat.check()
        for name, target in my_dense.items():
            loader.load_dense(name, target)
            heartbeat.check()
        finite_check.check()
    # Replicas receive their rows from the rank that has loaded them.
    for number, layer in enumerate(layers.values()):
        for tensor_name in PACKED_PARAMETERS:
            _broadcast_to_replicas(getattr(layer, tensor_name), number, comm)
    for number, target in enumerate(dense.values()):
        _broadcast_to_replicas(target, number, comm)
    seconds = time.perf_counter() - start
    stats = memory.stats(comm.rank, reader.bytes_read, prefetcher.seconds, seconds)
    return LoadResult(loader.squared_errors, stats)


@dataclass
class _RowLoader:
    """Quantizes or copies the rows of this rank, in the order in which they arrive."""

    prefetcher: Prefetcher
    finite_check: DeferredFiniteCheck
    device: torch.device
    on_packed_rows: Callable[[str, str, int, Tensor], object]
    squared_errors: dict[str, Tensor] = field(default_factory=dict)

    def load_layer(self, name: str, layer: HQQLinear | None, quantized: bool) -> None:
        """Quantize or copy the rows of one layer.

        `layer` is None if another rank loads it. This rank then records an error of 0 for it,
        because all ranks sum their lists of errors element by element.
        """
        self.squared_errors[name] = torch.zeros(2, dtype=torch.float64, device=self.device)
        if layer is None or not _has_rows(layer.W_q):
            return
        if quantized:
            packed_rows = {tensor_name: next(self.prefetcher) for tensor_name in PACKED_PARAMETERS}
        else:
            packed_rows = self._quantize(name, layer)
        for tensor_name, rows in packed_rows.items():
            # A float view of W_q may contain NaN patterns, which a cast would change: copy bytes.
            target = local_tensor(getattr(layer, tensor_name)).view(torch.uint8)
            target.copy_(rows.view(torch.uint8), non_blocking=True)
            self.on_packed_rows(name, tensor_name, local_rows(layer.W_q).start, rows)

    def load_dense(self, name: str, target: Tensor) -> None:
        """Copy a tensor that is not quantized."""
        first_row, target_rows = local_rows(target).start, local_tensor(target)
        target_rows = target_rows.view(target_rows.shape or (1,))  # a scalar has one row
        for rows in _dense_rows(target):
            values = next(self.prefetcher)
            self.finite_check.add(RowRange(name, [rows]), ~values.isfinite().all())
            target_rows[rows.start - first_row : rows.stop - first_row] = values

    def _quantize(self, name: str, layer: HQQLinear) -> dict[str, Tensor]:
        row_range = _source_rows(name, layer)
        weight = next(self.prefetcher)
        packed, not_finite = quantize_async(weight, layer.spec, name=row_range.name)
        self.finite_check.add(row_range, not_finite)
        self.squared_errors[name] += _squared_error(weight, packed, layer)
        return {tensor_name: getattr(packed, tensor_name) for tensor_name in PACKED_PARAMETERS}


def _is_mine(tensor: Tensor, number: int, comm: Communicator) -> bool:
    """Whether this rank loads tensor `number`: the ranks of a replica group take turns."""
    replicas = replica_group(tensor, comm)
    return number % replicas.size == replicas.rank


def _has_rows(tensor: Tensor) -> bool:
    rows = local_rows(tensor)
    return rows.start < rows.stop


def _layer_row_ranges(layers: Mapping[str, HQQLinear], quantized: bool) -> Iterator[RowRange]:
    for name, layer in layers.items():
        if _has_rows(layer.W_q) and quantized:
            rows = local_rows(layer.W_q)
            yield from (RowRange(f"{name}.{tensor}", [rows]) for tensor in PACKED_PARAMETERS)
        elif _has_rows(layer.W_q):
            yield _source_rows(name, layer)


def _source_rows(name: str, layer: HQQLinear) -> RowRange:
    """Return the rows of the source weight that this rank quantizes to its rows of W_q."""
    rows = local_rows(layer.W_q)
    return RowRange(f"{name}.weight", layer.layout.rows_of(rows.start, rows.stop))


def _dense_row_ranges(dense: Mapping[str, Tensor]) -> Iterator[RowRange]:
    for name, target in dense.items():
        yield from (RowRange(name, [rows]) for rows in _dense_rows(target))


def _dense_rows(target: Tensor) -> Iterator[slice]:
    """Yield this rank's rows in chunks of about `DENSE_CHUNK_NUMEL` elements."""
    rows, row_size = local_rows(target), max(1, target.shape[1:].numel())
    step = max(1, DENSE_CHUNK_NUMEL // row_size)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _squared_error(weight: Tensor, packed: QuantizedWeight, layer: HQQLinear) -> Tensor:
    """Return fp64 [||W - W'||^2, ||W||^2], in chunks, so that no second dense copy is needed."""
    layout = layer.layout.slice(0, packed.scale.shape[0])
    step = max(1, ERROR_CHUNK_NUMEL // layout.unit_codes)
    total = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for start in range(0, layout.units, step):
        stop = min(start + step, layout.units)
        chunk = QuantizedWeight(
            packed.W_q[start:stop], packed.scale[start:stop], packed.zero[start:stop]
        )
        approximation = dequantize_weight(chunk, layout.slice(start, stop), torch.float32)
        exact = torch.cat([weight[rows] for rows in layout.rows_of(start, stop)])
        total += squared_error(exact, approximation)
    return total


def _broadcast_to_replicas(tensor: Tensor, number: int, comm: Communicator) -> None:
    """Send tensor `number` from the rank that loaded it to its replicas. Collective among them."""
    replicas, shard = replica_group(tensor, comm), local_tensor(tensor)
    if replicas.size > 1 and shard.numel():
        comm.broadcast(shard, number % replicas.size, replicas.group)


def load_model(
    model: nn.Module,
    reader: WeightSource,
    comm: Communicator,
    *,
    quantized: bool = False,
    offload: bool = False,
    on_packed_rows: Callable[[str, str, int, torch.Tensor], object] = lambda *_: None,
    on_layer: Callable[[str], object] = lambda _: None,
) -> LoadResult:
    """Allocate `model` on the device of `comm` and load its weights from `reader`. Collective.

    The arguments are those of `load_weights` and `materialize`. Adapters get memory but no values.
    """
    materialize(model, comm.device, offload=offload)
    layers, dense = tensors_by_name(model)
    result = load_weights(
        layers,
        dense,
        reader,
        comm,
        quantized=quantized,
        on_packed_rows=on_packed_rows,
        on_layer=on_layer,
    )
    retie_weights(model)
    restored = restore_buffers(model, comm.device)
    check_filled(model, [*dense.values(), *restored])
    return result


def tensors_by_name(model: nn.Module) -> tuple[dict[str, HQQLinear], dict[str, torch.Tensor]]:
    """Return (quantized linears, dense tensors), each by its name in the checkpoint."""
    layers, dense = {}, {}
    for name, module, attribute, tensor in base_tensors(model):
        if is_packed(module, attribute):
            layers[name.removesuffix(f".{attribute}")] = module
        else:
            dense[name] = tensor
    return layers, dense
