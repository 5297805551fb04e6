"""Load the weights of a model: every rank reads, and quantizes, only the rows it owns.

Without calibration, the groups of a weight are independent. Each rank can therefore read its own
rows, quantize them and write them into its shard, without communication. With calibration it does
the same one decoder layer after the other; see `calibrated_load.py`. If several ranks hold the same
rows (`ddp`, or the replicas of hybrid sharding), one of them quantizes the rows and broadcasts the
result, so each row of the source is read only once.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.heartbeat import Heartbeat
from hqqtrain.distributed.local import local_tensor, materialize, replica_group
from hqqtrain.loading.calibrated_load import CalibratedLoader, Calibration
from hqqtrain.loading.dense_layers import DenseLayers
from hqqtrain.loading.filled_check import check_filled
from hqqtrain.loading.finite_check import DeferredFiniteCheck
from hqqtrain.loading.prefetch import Prefetcher
from hqqtrain.loading.rows import (
    RowLoader,
    dense_row_ranges,
    has_rows,
    is_mine,
    layer_row_ranges,
    source_rows,
)
from hqqtrain.loading.stats import LoadStats, MemoryTracker
from hqqtrain.models.build import restore_buffers
from hqqtrain.models.fqn import base_tensors, is_packed, retie_weights
from hqqtrain.models.weights.base import WeightSource
from hqqtrain.nn.base_linears import DenseLinear
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear
from hqqtrain.quant.error import error_ratio


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
         comm: Communicator, *, quantized: bool = False, base_weights: Collection[str] = (),
         calibration: Calibration | None = None,
         on_rows: Callable[[str, str, int, Tensor], object] = lambda *_: None,
         on_layer: Callable[[str], object] = lambda _: None) -> LoadResult:  # fmt: skip
    """Read every tensor of the model from the checkpoint and quantize the linears. Collective.

    Args:
        layers: Quantized linears by checkpoint name, materialized, in the same order on all ranks.
        dense: Tensors that are not quantized, by checkpoint name, in the same order on all ranks.
        reader: Source of the rows.
        comm: All ranks of the run.
        quantized: Whether the source already has W_q, scale and zero, so nothing is quantized.
        base_weights: The names in `dense` of the weights that `quant.nbits=null` leaves dense.
        calibration: The text for the linears of the decoder layers; None: none is calibrated.
        on_rows: Called with (module, tensor name, first row, rows) for the packed weights and the
            `base_weights` of this rank. Over all ranks, each row is reported once.
        on_layer: Called with the name of each layer that is quantized, or of `base_weights`.

    Returns:
        Quantization errors and loading statistics of this rank.

    Raises:
        UserError: A weight has NaN or Inf. Raised on every rank.
        RankLostError: Another rank has failed for another reason, or is gone.
    """
    start, memory = time.perf_counter(), MemoryTracker(comm.device)
    mine, my_dense = _owned(layers, dense, comm)
    dense_layers = DenseLayers(calibration.model, dense, layers, comm) if calibration else None
    calibrated = dense_layers.quantized() if dense_layers else {}
    alone = {name: layer for name, layer in layers.items() if name not in calibrated}
    # Each load takes the next rows of the prefetcher, so all loads follow this order.
    row_ranges = chain(
        layer_row_ranges({n: layers[n] for n in alone if n in mine}, quantized),
        dense_row_ranges(my_dense),
        (source_rows(name, layer) for name, layer in calibrated.items() if name in mine),
    )
    with Prefetcher(reader, row_ranges, comm.device, memory.sample) as prefetcher:
        loader = RowLoader(prefetcher, DeferredFiniteCheck(reader), comm.device, on_rows)
        with Heartbeat(comm) as heartbeat:
            for name, layer in alone.items():
                loader.load_layer(name, layer if name in mine else None, quantized)
                on_layer(name)
                heartbeat.check()
            for name, target in dense.items():
                if name in my_dense:
                    loader.load_dense(name, target, is_base_weight=name in base_weights)
                if name in base_weights:
                    on_layer(name.removesuffix(".weight"))
                heartbeat.check()
            loader.finite_check.check()
        _broadcast_to_replicas(dense.values(), comm)
        if calibration and dense_layers:
            text = calibration.sequences
            CalibratedLoader(text, dense_layers, loader, mine, comm, on_layer).load()
    for tensor_name in PACKED_PARAMETERS:
        _broadcast_to_replicas([getattr(layer, tensor_name) for layer in layers.values()], comm)
    seconds = time.perf_counter() - start
    stats = memory.stats(comm.rank, reader.bytes_read, prefetcher.seconds, seconds)
    return LoadResult(loader.squared_errors, stats)


def _owned(
    layers: Mapping[str, HQQLinear], dense: Mapping[str, Tensor], comm: Communicator
) -> tuple[set[str], dict[str, Tensor]]:
    """Return the names of the linears, and the dense tensors, that this rank reads rows of."""
    mine = {
        name
        for number, (name, layer) in enumerate(layers.items())
        if is_mine(layer.W_q, number, comm) and has_rows(layer.W_q)
    }
    numbered = enumerate(dense.items())
    return mine, {
        name: tensor for number, (name, tensor) in numbered if is_mine(tensor, number, comm)
    }


def _broadcast_to_replicas(tensors: Iterable[Tensor], comm: Communicator) -> None:
    """Send each tensor from the rank that has loaded it to its replicas. Collective among them."""
    for number, tensor in enumerate(tensors):
        replicas, shard = replica_group(tensor, comm), local_tensor(tensor)
        if replicas.size > 1 and shard.numel():
            comm.broadcast(shard, number % replicas.size, replicas.group)


def load_model(
    model: nn.Module,
    reader: WeightSource,
    comm: Communicator,
    *,
    quantized: bool = False,
    calibration: Calibration | None = None,
    on_host: Iterable[Tensor] = (),
    on_rows: Callable[[str, str, int, torch.Tensor], object] = lambda *_: None,
    on_layer: Callable[[str], object] = lambda _: None,
) -> LoadResult:
    """Allocate `model` on the device of `comm` and load its weights from `reader`. Collective.

    The arguments are those of `load_weights` and `materialize`. Adapters get memory but no values.
    """
    materialize(model, comm.device, on_host=on_host)
    layers, dense = tensors_by_name(model)
    result = load_weights(
        layers,
        dense,
        reader,
        comm,
        quantized=quantized,
        base_weights=_base_weights(model),
        calibration=calibration,
        on_rows=on_rows,
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


def _base_weights(model: nn.Module) -> set[str]:
    """Return the checkpoint names of the weights that `quant.nbits=null` leaves dense."""
    return {
        name
        for name, module, attribute, _ in base_tensors(model)
        if isinstance(module, DenseLinear) and attribute == "weight"
    }
