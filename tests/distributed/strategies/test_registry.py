"""The strategies of the registry are those that a recipe can name."""

from dataclasses import fields

import torch

from hqqtrain.config.parallel import ParallelConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.strategies.registry import STRATEGIES, resolve_strategy

TWO = Communicator(0, 2, torch.device("cpu"))


def test_a_recipe_can_name_every_strategy():
    (field,) = (f for f in fields(ParallelConfig) if f.name == "strategy")
    assert set(field.metadata["choices"]) == {"auto", *STRATEGIES}


def test_auto_depends_on_the_number_of_processes(caplog):
    caplog.set_level("INFO")
    assert resolve_strategy("auto", SINGLE_PROCESS).name == "single"
    assert resolve_strategy("auto", TWO).name == "fsdp2"
    assert caplog.messages[1] == "parallel.strategy=auto: fsdp2, for 2 processes"
    assert resolve_strategy("zero3", TWO).name == "zero3"
