"""Predict memory, speed and disk of a training from its configuration and a machine."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import nn

from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.check import RuntimeSettings
from hqqtrain.loading.activation_memory import activation_bytes
from hqqtrain.loading.memory_check import WARNING_FRACTION
from hqqtrain.loading.memory_estimate import MemoryEstimate, estimate_memory
from hqqtrain.loading.plan import ModelPlan, plan_model
from hqqtrain.loading.time_estimate import TimeEstimate, estimate_time
from hqqtrain.loading.workload import Workload
from hqqtrain.models.families.structure import text_config
from hqqtrain.tasks.machine import Machine, find_machine
from hqqtrain.tasks.model import plan_settings
from hqqtrain.tasks.resources import workload_of
from hqqtrain.training.checkpointing_policy import HOST_FRACTION
from hqqtrain.training.metrics import flops_per_token


@dataclass(frozen=True)
class Prediction:
    """The memory that a training needs, and the time of a step.

    Attributes:
        config: The configuration of the training.
        machine: The machine that it was predicted for.
        workload: Its settings; those that were `auto` are resolved.
        strategy: The name of its strategy.
        precision: The value of `train.precision`, resolved.
        memory: Bytes by purpose.
        times: Name of a GPU -> duration of a step on it; empty if no speed is known.
        num_layers: Number of decoder layers.
        parameters: Number of the weights of the full-precision model.
        trained: Number of the trained parameters.
        flops_per_token: FLOPs that MFU counts for a token.
    """

    config: RunConfig
    machine: Machine
    workload: Workload
    strategy: str
    precision: str
    memory: MemoryEstimate
    times: dict[str, TimeEstimate]
    num_layers: int
    parameters: int
    trained: int
    flops_per_token: int

    @property
    def needed(self) -> int:
        """Bytes on the device of a rank, while it trains or while it is calibrated."""
        return max(self.memory.peak, self.memory.calibration)

    @property
    def share(self) -> float:
        """Those bytes as a fraction of what the tensors of a rank can take."""
        return self.needed / max(1, self.machine.usable)

    @property
    def fits(self) -> bool:
        """Whether the training fits, with the reserve that a run has, too."""
        return self.share <= WARNING_FRACTION

    def mfu(self, name: str) -> float | None:
        """Return the model FLOPs utilization on the GPU `name`."""
        flops = self.machine.kinds()[name].flops
        if flops is None:
            return None
        rate = self.times[name].tokens_per_second / self.machine.ranks
        return rate * self.flops_per_token / flops


class Predictor:
    """Predicts trainings of one model, on any machine.

    Args:
        runtime: The runtime of this process, of which the plans take over what does not matter.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._plans: dict[str, ModelPlan] = {}

    def predict(self, config: RunConfig) -> Prediction:
        """Predict the training of `config`, whose task is `finetune`.

        Raises:
            UserError: The configuration has a fault, or the model does.
        """
        config.check()
        machine = find_machine(config)
        runtime = self._runtime_on(config, machine)
        plan = self._plan(config, runtime)
        workload = workload_of(
            config,
            offloads_activations=runtime.offloads_activations,
            is_packed=plan.is_packed,
            calibrates=plan.calibrates,
        )
        per_rank = max(1, workload.global_batch_size // machine.ranks)
        micro_batch = min(workload.micro_batch_size, per_rank)
        workload = replace(workload, micro_batch_size=micro_batch)

        def memory(mode: str | int) -> MemoryEstimate:
            used = replace(workload, activation_checkpointing=mode)
            return estimate_memory(used, plan.model, runtime.strategy, dtype=runtime.dtype)

        depth = text_config(plan.model).num_hidden_layers
        if workload.activation_checkpointing == "auto":
            mode = _automatic_mode(workload, plan.model, runtime, machine, memory)
            workload = replace(workload, activation_checkpointing=mode)
        estimate = memory(workload.activation_checkpointing)
        return Prediction(
            config, machine, workload, runtime.strategy.name, runtime.precision, estimate,
            _times(workload, plan.model, runtime, machine, estimate), depth,
            sum(torch.Size(plan.reader.shape(name)).numel() for name in plan.reader.names),
            sum(p.numel() for p in plan.model.parameters() if p.requires_grad),
            flops_per_token(plan.model),
        )  # fmt: skip

    def _runtime_on(self, config: RunConfig, machine: Machine) -> Runtime:
        settings = RuntimeSettings(
            config.parallel, config.quant, config.adapter, config.train, config.optim, trains=True
        )
        precision = config.train.precision
        if precision == "auto":
            precision = "bf16" if machine.gpu else "fp32"
        comm = Communicator(0, machine.ranks, machine.device)
        return self._runtime.on_devices(settings, comm, precision, machine.nodes)

    def _plan(self, config: RunConfig, runtime: Runtime) -> ModelPlan:
        """Plan the model; checks that call a small copy of it are made for the first plan alone."""
        groups: list[Any] = [asdict(config.quant), asdict(config.adapter), runtime.precision]
        key = str([*groups, runtime.storage_dtype])
        if key not in self._plans:
            settings = plan_settings(config)
            settings = replace(settings, has_weights=False, executes=not self._plans)
            self._plans[key] = plan_model(settings, runtime)
        return self._plans[key]


def _automatic_mode(
    workload: Workload, model: nn.Module, runtime: Runtime, machine: Machine,
    memory: Callable[[str | int], MemoryEstimate],
) -> str | int:  # fmt: skip
    """Return what `train.activation_checkpointing=auto` would choose on `machine`."""
    if machine.gpu is None:
        kept = activation_bytes(
            replace(workload, activation_checkpointing="none"), model, runtime.dtype
        )
        return "none" if kept < HOST_FRACTION * machine.usable else "full"
    if runtime.strategy.frees_parameters:
        return "full"
    depth, limit = text_config(model).num_hidden_layers, WARNING_FRACTION * machine.usable
    peak = memory("none").peak
    if peak <= limit:
        return "none"
    per_layer = peak - memory(1).peak
    number = ceil((peak - limit) / per_layer) if per_layer > 0 else depth
    return number if number < depth else "full"


def _times(
    workload: Workload, model: nn.Module, runtime: Runtime, machine: Machine, memory: MemoryEstimate
) -> dict[str, TimeEstimate]:
    """Return the duration of a step for every GPU that `machine` may have."""
    times = {
        name: estimate_time(
            workload, model, runtime.strategy, memory, gpu,
            dtype=runtime.dtype, world_size=machine.ranks,
        )
        for name, gpu in machine.kinds().items()
    }  # fmt: skip
    return {name: time for name, time in times.items() if time is not None}
