"""Report every contradiction of the strategy with the other settings and with the machine."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.conflicts import (
    BF16_ADAPTERS_IN_FP16,
    PAGED_OPTIMIZERS,
    Conflict,
    conflict_errors,
)
from hqqtrain.config.groups import OptimConfig, TrainConfig
from hqqtrain.config.parallel import ParallelConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.strategies.base import BITSANDBYTES_OPTIMIZERS, Capabilities, Strategy
from hqqtrain.distributed.strategies.registry import STRATEGIES

MACHINE_CONFLICTS = (
    Conflict(
        {"optim.name": PAGED_OPTIMIZERS, "device": ("cpu",)},
        "paged optimizers need a CUDA GPU; use adamw or adamw_8bit.",
    ),
    BF16_ADAPTERS_IN_FP16,  # again, because accelerate's configuration may decide the precision
)
"""Combinations that no strategy supports; checked once the device and the precision are known."""


@dataclass(frozen=True)
class RuntimeSettings:
    """The groups of the configuration that decide how the processes of a run work together.

    Attributes:
        trains: Whether the task trains. Only then the optimizer and the batch size matter.
    """

    parallel: ParallelConfig
    quant: QuantConfig
    adapter: AdapterConfig
    train: TrainConfig
    optim: OptimConfig
    trains: bool

    @classmethod
    def of_any_machine(cls, quant: QuantConfig) -> "RuntimeSettings":
        """Return settings that every machine supports, to look at inputs without running a model.

        Args:
            quant: The settings that say which layers of the model are quantized.
        """
        quant = replace(quant, backend="auto", storage_dtype="auto", offload_meta=False)
        train = TrainConfig(precision="fp32")
        return cls(ParallelConfig(), quant, AdapterConfig(), train, OptimConfig(), trains=False)


def check_supported(
    strategy: type[Strategy],
    settings: RuntimeSettings,
    *,
    precision: str,
    device: str,
    world_size: int,
) -> None:
    """Check the strategy against the settings, before anything is read or written.

    Args:
        strategy: The strategy, with `auto` already resolved.
        settings: The settings of the run.
        precision: A value of `train.precision`, with `auto` already resolved.
        device: Type of this rank's device, "cpu" or "cuda".
        world_size: Number of ranks.

    Raises:
        UserError: Settings contradict each other. The message has a line for each contradiction.
    """
    errors = [
        *_process_errors(strategy, settings, world_size),
        *_parallel_errors(strategy, settings),
        *_conflict_errors(strategy, settings, precision, device),
    ]
    if errors:
        raise UserError("\n".join(errors))


def _process_errors(
    strategy: type[Strategy], settings: RuntimeSettings, world_size: int
) -> Iterator[str]:
    batch = settings.train.global_batch_size
    if settings.trains and batch % world_size:
        yield f"train.global_batch_size={batch}: must be a multiple of the {world_size} processes."
    if world_size > 1 and not strategy.supports.several_processes:
        yield (
            f"parallel.strategy={strategy.name}: {world_size} processes were started; use ddp, "
            "fsdp2 or auto."
        )
    package = strategy.supports.package
    if package and importlib.util.find_spec(package) is None:
        yield (
            f"parallel.strategy={strategy.name}: needs {package}, which is not installed: pip "
            f"install 'hqqtrain[{package}]'. fsdp2 shards as much and needs no other package."
        )


def _parallel_errors(strategy: type[Strategy], settings: RuntimeSettings) -> Iterator[str]:
    parallel = settings.parallel
    enough = ("always",) if settings.trains else ("always", "without training")
    if parallel.offloads_parameters and strategy.supports.parameter_offload not in enough:
        able = _strategies_with(lambda supports: supports.parameter_offload in enough)
        instead = "quant.offload_meta=true"
        if settings.trains:
            instead = "train.activation_checkpointing=offload"
        yield (
            f"parallel.offload={parallel.offload}: only parallel.strategy={able} offloads "
            f"parameters{' in training' * settings.trains}, not {strategy.name}; use {able}, or "
            f"{instead}."
        )
    quant = settings.quant
    if quant.quantizes and quant.offload_meta and not strategy.supports.meta_offload:
        able = _strategies_with(lambda supports: supports.meta_offload)
        offloads = strategy.supports.parameter_offload != "never"
        instead = ", or parallel.offload=parameters, which offloads them, too" if offloads else ""
        yield (
            f"quant.offload_meta=true: parallel.strategy={strategy.name} shards scale and zero; "
            f"use {able}{instead}."
        )
    if parallel.hsdp and not strategy.supports.hsdp:
        able = _strategies_with(lambda supports: supports.hsdp)
        yield f"parallel.hsdp=true: needs parallel.strategy={able}, not {strategy.name}."


def _strategies_with(has: Callable[[Capabilities], bool]) -> str:
    """Return the names of the strategies that have a capability, joined by "or"."""
    return " or ".join(name for name, strategy in STRATEGIES.items() if has(strategy.supports))


def _conflict_errors(
    strategy: type[Strategy], settings: RuntimeSettings, precision: str, device: str
) -> Iterator[str]:
    train, optim = replace(settings.train, precision=precision), settings.optim
    if not settings.trains:
        optim = OptimConfig()
    elif optim.name in BITSANDBYTES_OPTIMIZERS and not importlib.util.find_spec("bitsandbytes"):
        yield f"optim.name={optim.name}: needs bitsandbytes, which is not installed; use adamw."
    groups = {"quant": settings.quant, "adapter": settings.adapter, "train": train,
              "optim": optim, "device": device}  # fmt: skip
    yield from conflict_errors((*MACHINE_CONFLICTS, *strategy.supports.conflicts), groups)
