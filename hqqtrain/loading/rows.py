"""The rows that a rank reads, and what becomes of them: quantized or copied into its shard."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.local import local_rows, local_tensor, replica_group
from hqqtrain.loading.finite_check import DeferredFiniteCheck
from hqqtrain.loading.prefetch import Prefetcher, RowRange
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear
from hqqtrain.quant.error import squared_error
from hqqtrain.quant.quantize import QuantizedWeight, dequantize_weight, quantize_async

DENSE_CHUNK_NUMEL = 1 << 25
"""Elements of a dense tensor that are read at a time, to bound memory; some tensors have 2**31."""

ERROR_CHUNK_NUMEL = 1 << 24
"""Elements that are dequantized at a time to measure the error, fewer than a weight has."""


@dataclass
class RowLoader:
    """Quantizes or copies the rows of this rank, in the order in which they arrive."""

    prefetcher: Prefetcher
    finite_check: DeferredFiniteCheck
    device: torch.device
    on_rows: Callable[[str, str, int, Tensor], object]
    squared_errors: dict[str, Tensor] = field(default_factory=dict)

    def load_layer(self, name: str, layer: HQQLinear | None, quantized: bool) -> None:
        """Quantize or copy the rows of one layer.

        `layer` is None if another rank loads it. This rank then records an error of 0 for it,
        because all ranks sum their lists of errors element by element.
        """
        self.squared_errors[name] = torch.zeros(2, dtype=torch.float64, device=self.device)
        if layer is None or not has_rows(layer.W_q):
            return
        if quantized:
            self.store(name, layer, *(next(self.prefetcher) for _ in PACKED_PARAMETERS))
        else:
            packed = self._quantize(name, layer)
            self.store(name, layer, packed.W_q, packed.scale, packed.zero)

    def store(self, name: str, layer: HQQLinear, W_q: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Copy the packed rows of one layer into the shard of this rank."""
        for tensor_name, rows in zip(PACKED_PARAMETERS, (W_q, scale, zero), strict=True):
            # A float view of W_q may contain NaN patterns, which a cast would change: copy bytes.
            target = local_tensor(getattr(layer, tensor_name)).view(torch.uint8)
            target.copy_(rows.view(torch.uint8), non_blocking=True)
            self.on_rows(name, tensor_name, local_rows(layer.W_q).start, rows)

    def load_dense(self, name: str, target: Tensor, *, is_base_weight: bool = False) -> None:
        """Copy a tensor that is not quantized.

        Args:
            name: Its name in the checkpoint.
            target: The tensor, of which this rank may have only some rows.
            is_base_weight: Whether it is the weight of a linear layer that may have an adapter;
                its rows are reported to `on_rows` as the source has them.
        """
        first_row, target_rows = local_rows(target).start, local_tensor(target)
        target_rows = target_rows.view(target_rows.shape or (1,))  # a scalar has one row
        for rows in _dense_rows(target):
            values = next(self.prefetcher)
            self.finite_check.add(RowRange(name, [rows]), ~values.isfinite().all())
            target_rows[rows.start - first_row : rows.stop - first_row] = values
            if is_base_weight:
                module, _, attribute = name.rpartition(".")
                self.on_rows(module, attribute, rows.start, values)

    def _quantize(self, name: str, layer: HQQLinear) -> QuantizedWeight:
        row_range = source_rows(name, layer)
        weight = next(self.prefetcher)
        packed, not_finite = quantize_async(weight, layer.spec, name=row_range.name)
        self.finite_check.add(row_range, not_finite)
        self.squared_errors[name] += layer_squared_error(weight, packed, layer)
        return packed


def is_mine(tensor: Tensor, number: int, comm: Communicator) -> bool:
    """Whether this rank loads tensor `number`: the ranks of a replica group take turns."""
    replicas = replica_group(tensor, comm)
    return number % replicas.size == replicas.rank


def has_rows(tensor: Tensor) -> bool:
    """Whether this rank holds any row of `tensor`."""
    rows = local_rows(tensor)
    return rows.start < rows.stop


def layer_row_ranges(layers: Mapping[str, HQQLinear], quantized: bool) -> Iterator[RowRange]:
    """Yield what this rank reads for `layers`: packed rows, or the rows that it quantizes."""
    for name, layer in layers.items():
        if has_rows(layer.W_q) and quantized:
            rows = local_rows(layer.W_q)
            yield from (RowRange(f"{name}.{tensor}", [rows]) for tensor in PACKED_PARAMETERS)
        elif has_rows(layer.W_q):
            yield source_rows(name, layer)


def source_rows(name: str, layer: HQQLinear) -> RowRange:
    """Return the rows of the source weight that this rank quantizes to its rows of W_q."""
    rows = local_rows(layer.W_q)
    return RowRange(f"{name}.weight", layer.layout.rows_of(rows.start, rows.stop))


def dense_row_ranges(dense: Mapping[str, Tensor]) -> Iterator[RowRange]:
    """Yield what this rank reads for tensors that are not quantized."""
    for name, target in dense.items():
        yield from (RowRange(name, [rows]) for rows in _dense_rows(target))


def _dense_rows(target: Tensor) -> Iterator[slice]:
    """Yield this rank's rows in chunks of about `DENSE_CHUNK_NUMEL` elements."""
    rows, row_size = local_rows(target), max(1, target.shape[1:].numel())
    step = max(1, DENSE_CHUNK_NUMEL // row_size)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def layer_squared_error(weight: Tensor, packed: QuantizedWeight, layer: HQQLinear) -> Tensor:
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
