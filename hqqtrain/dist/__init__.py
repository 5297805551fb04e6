"""Distributed execution: ranks, the rows each of them owns, and checks that they agree."""

from hqqtrain.dist.bits import as_integers, check_bits
from hqqtrain.dist.fill import Filled, fill
from hqqtrain.dist.fsdp1 import wrap_layers
from hqqtrain.dist.launcher import settle
from hqqtrain.dist.pieces import Piece, gathered_pieces, piece_of, place_of
from hqqtrain.dist.processes import ALONE, Processes, relaunch_if_ranks_were_lost
from hqqtrain.dist.report import LoadReport
from hqqtrain.dist.sentinel import DivergedError, Sentinel
from hqqtrain.dist.shards import count, full_tensor, local, materialise, owned_rows, write_full
from hqqtrain.dist.spread import check_flat, spread
from hqqtrain.dist.strategy import FLAT, choose_replicas, choose_storage, choose_strategy, shard
from hqqtrain.dist.zero3 import partition, training_engine

__all__ = [
    "ALONE", "FLAT", "DivergedError", "Filled", "LoadReport", "Piece", "Processes", "Sentinel",
    "as_integers", "check_bits", "check_flat", "choose_replicas", "choose_storage",
    "choose_strategy", "count", "fill", "full_tensor", "gathered_pieces", "local", "materialise",
    "owned_rows", "partition", "piece_of", "place_of", "relaunch_if_ranks_were_lost", "settle",
    "shard", "spread", "training_engine", "wrap_layers", "write_full",
]  # fmt: skip
