"""The parallel strategies that a recipe can name, and the choice of `auto`."""

import logging

from hqqtrain.common.text import count
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.distributed.strategies.fsdp1 import FSDP1
from hqqtrain.distributed.strategies.fsdp2 import FSDP2
from hqqtrain.distributed.strategies.unsharded import DDP, SingleProcess
from hqqtrain.distributed.strategies.zero3 import ZeRO3

logger = logging.getLogger(__name__)

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (SingleProcess, DDP, FSDP2, FSDP1, ZeRO3)
}
"""The strategies by their name in `parallel.strategy`."""


def resolve_strategy(wanted: str, comm: Communicator) -> type[Strategy]:
    """Return the strategy of `parallel.strategy`; `auto` is single for one process, else FSDP2."""
    if wanted != "auto":
        return STRATEGIES[wanted]
    strategy = SingleProcess if comm.size == 1 else FSDP2
    if comm.is_main:
        logger.info(
            "parallel.strategy=auto: %s, for %s", strategy.name, count(comm.size, "process")
        )
    return strategy
