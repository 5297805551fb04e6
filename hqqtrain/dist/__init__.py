"""Ranks: who they are, which rows are theirs, and what they must agree on."""

from hqqtrain.dist.bits import as_integers, check_bits
from hqqtrain.dist.fill import Filled, fill
from hqqtrain.dist.launcher import settle
from hqqtrain.dist.processes import ALONE, Processes, relaunch_if_ranks_were_lost
from hqqtrain.dist.report import LoadReport
from hqqtrain.dist.sentinel import DivergedError, Sentinel
from hqqtrain.dist.shards import full_tensor, materialise, owned_rows, write_full
from hqqtrain.dist.strategy import choose_replicas, choose_storage, choose_strategy, shard

__all__ = [
    "ALONE", "DivergedError", "Filled", "LoadReport", "Processes", "Sentinel", "as_integers", "check_bits", "choose_replicas", "choose_storage", "choose_strategy", "fill",
    "full_tensor", "materialise", "owned_rows", "relaunch_if_ranks_were_lost", "settle", "shard",
    "write_full",
]  # fmt: skip
