"""One process: the model stays as it is."""

from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.distributed.strategies.supports import Supports


class SingleProcess(Strategy):
    """No parallelism."""

    name = "single"
    supports = Supports(several_processes=False)
