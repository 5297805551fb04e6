"""Plans of the tiny model, on a GPU that need not exist."""

from hqqtrain.config.groups import TrainConfig
from hqqtrain.config.plan import PlanConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.check import RuntimeSettings
from hqqtrain.tasks.prediction import Predictor


def new_predictor() -> Predictor:
    """Return a predictor in this process."""
    config = RunConfig()
    settings = RuntimeSettings.of_any_machine(config.quant)
    return Predictor(Runtime.start(settings, PreemptionHandler(config.run)))


def planned_config(gpu: str = "H100", gpus: int | None = None) -> RunConfig:
    """Return a training of the tiny model, 4 x 256 tokens in each micro-batch."""
    train = TrainConfig(max_steps=100, global_batch_size=8, micro_batch_size=4, max_seq_len=256)
    quant = QuantConfig(nbits=2, group_size=64, calibration=None)
    return RunConfig(quant=quant, train=train, plan=PlanConfig(gpu=gpu, gpus=gpus))
