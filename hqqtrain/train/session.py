"""State that all tasks of a run share: ranks, device, precision and strategy, all resolved."""

import logging
import os
import resource
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from hqqtrain.config import RunConfig, UserError
from hqqtrain.dist import Processes, choose_replicas, choose_storage, choose_strategy, settle
from hqqtrain.train.interrupt import Interrupt
from hqqtrain.train.optimizer import check_optimizer
from hqqtrain_kernels import backend as kernel_backend

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=30)
"""Time-out of collectives: the other ranks wait while rank 0 writes a large model."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of `train.precision`."""


@dataclass(frozen=True)
class Session:
    """Runtime of one process, created once, after the configuration was checked.

    `precision` names the dtype of matrix products (`train.precision`); `storage` is the dtype that
    W_q is viewed as.
    """

    config: RunConfig
    accelerator: Accelerator
    processes: Processes
    strategy: str
    precision: str
    storage: torch.dtype
    replicas: int
    """Number of replicas of the sharded model, see `parallel.hybrid`."""
    interrupt: Interrupt

    @classmethod
    def start(cls, config: RunConfig, interrupt: Interrupt) -> "Session":
        """Join the process group, if any, and resolve the settings that are `auto`. Collective.

        Args:
            config: The run's configuration.
            interrupt: Knows whether this rank was asked to stop.

        Raises:
            UserError: Settings do not fit the machine or the number of processes.
        """
        cuda = torch.cuda.is_available()
        wanted, precision = settle(os.environ, config)
        if precision == "auto":
            precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
        if precision == "fp16" and not cuda:
            raise UserError("train.precision=fp16: needs a GPU; use fp32 or bf16 on a CPU.")
        # The gradients of offloaded parameters are reduced on the host, which needs gloo, too.
        backend = "cuda:nccl,cpu:gloo" if cuda and config.parallel.offloads_parameters else None
        accelerator = Accelerator(
            cpu=not cuda,
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=PATIENCE)],
        )
        processes = Processes(
            accelerator.process_index, accelerator.num_processes, accelerator.device
        )
        _check_batch(config, processes.size)
        strategy = choose_strategy(wanted, processes.size)
        if processes.is_main and wanted == "auto":
            logger.info("parallel.strategy=auto: %s, for %d processes", strategy, processes.size)
        _check(config, strategy, precision, processes.device)
        _choose_backend(config.quant.backend, processes)
        storage = choose_storage(config.quant.storage, strategy, DTYPES[precision])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", processes.size == 1))
        replicas = choose_replicas(config.parallel.hybrid, strategy, processes.gather(local_size))
        return cls(
            config, accelerator, processes, strategy, precision, storage, replicas, interrupt
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of unquantized weights and of matrix products."""
        return DTYPES[self.precision]

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def autocast(self) -> AbstractContextManager:
        """Context for matrix products in `precision`, as in training."""
        return self.accelerator.autocast()

    @property
    def offloads_activations(self) -> bool:
        """Whether activations are offloaded: on a CPU they are in host memory anyway."""
        return self.config.parallel.offloads_activations and self.device.type == "cuda"

    @property
    def offloads_parameters(self) -> bool:
        """Whether parameters are offloaded: on a CPU they are in host memory anyway."""
        return self.config.parallel.offloads_parameters and self.device.type == "cuda"

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"

    def peak_memory_gib(self) -> float:
        """Return the largest peak memory of any rank so far, in GiB. Collective.

        It is that of the GPU or, without one, of the process.
        """
        return max(self.processes.gather(_peak_bytes(self.device))) / 2**30


def _choose_backend(backend: str, processes: Processes) -> None:
    try:
        chosen = kernel_backend.set_backend(backend)
    except ValueError as fault:
        raise UserError(f"quant.{fault}") from None
    if processes.is_main:
        logger.info("quant.backend=%s: %s", backend, chosen)


def _check(config: RunConfig, strategy: str, precision: str, device: torch.device) -> None:
    """Raise UserError for keys that do not fit the strategy or the device."""
    offload = config.parallel.offload
    if config.task == "finetune":
        check_optimizer(config.optim, strategy, precision, device)
    if strategy == "zero3" and precision == "fp16":
        raise UserError(
            "train.precision=fp16: parallel.strategy=zero3 does not support gradient scaling "
            "here; use bf16, or fsdp2."
        )
    if strategy == "zero3" and config.train.on_nonfinite != "stop":
        raise UserError(
            f"train.on_nonfinite={config.train.on_nonfinite}: DeepSpeed steps before it "
            "reveals the gradient norm; under parallel.strategy=zero3 use stop, or fsdp2."
        )
    if strategy == "zero3" and config.adapter.dtype == "bf16":
        raise UserError(
            "adapter.dtype=bf16: DeepSpeed keeps fp32 copies and moments of the trained "
            "parameters, so bf16 saves no memory under parallel.strategy=zero3; use fp32, or fsdp2."
        )
    if config.parallel.offloads_parameters and strategy != "fsdp2":
        raise UserError(
            f"parallel.offload={offload}: only parallel.strategy=fsdp2 offloads parameters, not "
            f"{strategy}; use fsdp2, or parallel.offload=activations."
        )
    if offload != "none" and device.type != "cuda":
        logger.warning("parallel.offload=%s: has no effect on a CPU", offload)


def _check_batch(config: RunConfig, world_size: int) -> None:
    if config.task == "finetune" and config.train.global_batch_size % world_size:
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size}: must be a multiple of the "
            f"{world_size} processes."
        )


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
