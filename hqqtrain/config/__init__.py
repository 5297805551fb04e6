"""The configuration: plain dataclasses that check themselves, in the standard library only."""

from hqqtrain.config.errors import PreemptedError, RankLostError, UserError, did_you_mean
from hqqtrain.config.groups import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    TrainConfig,
)
from hqqtrain.config.run import RunConfig
from hqqtrain.config.running import CkptConfig, LaunchConfig, RunSection, TrackConfig

__all__ = [
    "AdapterConfig", "CkptConfig", "DataConfig", "EvalConfig", "LaunchConfig", "ModelConfig",
    "OptimConfig", "ParallelConfig", "PreemptedError", "QuantConfig", "RankLostError", "RunConfig",
    "RunSection", "TrackConfig", "TrainConfig", "UserError", "did_you_mean",
]  # fmt: skip
