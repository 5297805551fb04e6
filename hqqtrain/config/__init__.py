"""Configuration: plain dataclasses, checked, standard library only."""

from hqqtrain.config.errors import RankLostError, UserError, did_you_mean
from hqqtrain.config.groups import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    RunSection,
    TrackConfig,
    TrainConfig,
)
from hqqtrain.config.run import RunConfig

__all__ = [
    "AdapterConfig", "DataConfig", "EvalConfig", "ModelConfig", "OptimConfig", "ParallelConfig",
    "QuantConfig", "RankLostError", "RunConfig", "RunSection", "TrackConfig", "TrainConfig",
    "UserError", "did_you_mean",
]  # fmt: skip
