"""Build the engine of a strategy."""

from collections.abc import Mapping

from torch import nn

from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.training.engine import Engine
from hqqtrain.training.torch_engine import TorchEngine
from hqqtrain.training.zero3_engine import ZeRO3Engine


def build_engine(
    model: nn.Module,
    trainables: Mapping[str, nn.Parameter],
    runtime: Runtime,
    optim: OptimConfig,
    max_grad_norm: float | None,
) -> Engine:
    """Build the engine that the strategy of `runtime` needs. Collective.

    Args:
        model: The model, ready to be called.
        trainables: The trainable parameters of `model` by name.
        runtime: Strategy, device and precision of the run.
        optim: Settings of the optimizer.
        max_grad_norm: Largest gradient norm, above which gradients are clipped; None: no clipping.
    """
    if runtime.strategy.engine == "deepspeed":
        return ZeRO3Engine(
            model,
            trainables,
            optim,
            autocast=runtime.training_dtype,
            device=runtime.device,
            max_grad_norm=max_grad_norm,
        )
    return TorchEngine(
        model,
        trainables,
        runtime.accelerator,
        optim,
        max_grad_norm=max_grad_norm,
        uses_ddp=runtime.strategy.uses_ddp,
    )
