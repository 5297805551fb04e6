"""The config group of task=plan, with the help text of every key."""

from collections.abc import Iterator
from dataclasses import dataclass

from hqqtrain.common.errors import did_you_mean
from hqqtrain.common.gpus import GPUS, find_gpu
from hqqtrain.config.field import key
from hqqtrain.config.groups import AUTO


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """The machine that task=plan predicts a training for."""

    gpu: str = key(
        AUTO,
        "name of a GPU, such as H100 or RTX4090, or its memory, such as 24GB; auto: that of this "
        "machine, or its memory if it has none",
    )
    gpus: int | None = key(
        None,
        "number of GPUs; null: those of the job with launch=slurm, those of this machine with "
        "plan.gpu=auto, otherwise 1",
        low=1,
    )

    def errors(self) -> Iterator[str]:
        """Yield a message if `gpu` names no GPU that is known."""
        if self.gpu != AUTO and find_gpu(self.gpu) is None:
            names = [name.replace(" ", "") for name in GPUS]
            yield (
                f"plan.gpu={self.gpu}: is no known GPU; give its memory, such as 24GB, or one of "
                f"{', '.join(names)}.{did_you_mean(self.gpu, names)}"
            )
