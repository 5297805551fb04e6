"""Decide how many decoder layers recompute, as `train.activation_checkpointing` says."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import nn

from hqqtrain.common.env import get_local_world_size
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.loading.activation_memory import activation_bytes
from hqqtrain.loading.memory_check import available_memory
from hqqtrain.loading.workload import Workload
from hqqtrain.models.families.structure import checkpointed_layers
from hqqtrain.models.fqn import base_model
from hqqtrain.training.activation_checkpointing import (
    apply_activation_checkpointing,
    recompute_first,
)
from hqqtrain.training.automatic_checkpointing import AutomaticCheckpointing, GPUMemory

logger = logging.getLogger(__name__)

HOST_FRACTION = 0.5
"""Fraction of the free host memory that `auto` lets activations on a CPU fill."""


def apply_checkpointing(
    model: nn.Module, runtime: Runtime, workload: Workload, undo: ExitStack
) -> Callable[[], object]:
    """Apply `train.activation_checkpointing` to a model that the strategy has wrapped. Collective.

    Args:
        model: The model, changed in place.
        runtime: Strategy and device.
        workload: Has the value of the key, and the size of a micro-batch.
        undo: Takes the changes back when it is closed.

    Returns:
        A function that is called after each optimizer step, on all ranks.
    """
    mode, layers = workload.activation_checkpointing, checkpointed_layers(model)
    frees_parameters = runtime.strategy.frees_parameters
    if mode == "auto" and not base_model(model).supports_gradient_checkpointing:
        mode = "none"
    # ZeRO-3 gathers parameters at any time, which would be measured as activations.
    if mode == "auto" and (frees_parameters or not layers):
        mode = "full"
    if mode == "auto" and runtime.device.type == "cpu":
        mode = _mode_on_cpu(model, runtime, workload)
    if mode == "none":
        return _do_nothing
    apply_activation_checkpointing(
        model, undo, offload=runtime.offloads_activations, frees_parameters=frees_parameters
    )
    if isinstance(mode, int):
        recompute_first(layers, mode)
    if mode != "auto":
        return _do_nothing
    automatic = AutomaticCheckpointing(
        layers, GPUMemory(runtime.device), runtime.comm, workload.tokens
    )
    undo.callback(automatic.remove)
    return automatic.after_step


def _do_nothing() -> None:
    """Do nothing after a step."""


def _mode_on_cpu(model: nn.Module, runtime: Runtime, workload: Workload) -> str:
    """Return `none` if the activations of all layers fit in host memory, otherwise `full`.

    Recomputing takes time, and host memory is seldom short. Collective.
    """
    everything = replace(workload, activation_checkpointing="none")
    needed = activation_bytes(everything, model, runtime.dtype) * (get_local_world_size() or 1)
    limit = HOST_FRACTION * available_memory("cpu", Path(workload.run_root)).host
    fits = all(runtime.comm.all_gather_object(needed < limit))
    if runtime.comm.is_main:
        logger.info(
            "train.activation_checkpointing=auto: %s decoder layers recompute; all activations "
            "would take about %.3g GiB",
            "no" if fits else "all", needed / 2**30,
        )  # fmt: skip
    return "none" if fits else "full"
