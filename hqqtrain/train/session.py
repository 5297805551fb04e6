"""What every task of a run shares: the processes, the device, the precision, the strategy."""

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
from hqqtrain_kernels import select

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=30)
"""How long ranks wait for one another: the main one writes a large model while they do."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Session:
    """Made once per process, after the configuration was checked.

    `precision` is the dtype of matrix products (`train.precision`), `storage` that of W_q.
    """

    config: RunConfig
    accelerator: Accelerator
    processes: Processes
    strategy: str
    precision: str
    storage: torch.dtype
    replicas: int
    """How often the model is there, sharded; see `parallel.hybrid`."""
    interrupt: Interrupt

    @classmethod
    def start(cls, config: RunConfig, interrupt: Interrupt) -> "Session":
        """Joins the process group, if there is one, and decides what `auto` means here.

        Raises:
            UserError: settings that do not fit the machine or the number of processes.
        """
        cuda = torch.cuda.is_available()
        wanted, precision = settle(os.environ, config)
        if precision == "auto":
            precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
        if precision == "fp16" and not cuda:
            raise UserError("train.precision=fp16: needs a GPU; on a CPU use fp32 or bf16.")
        # Of offloaded parameters gradients are summed on the host, too.
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
        """The dtype of unquantized weights and of matrix products."""
        return DTYPES[self.precision]

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def autocast(self) -> AbstractContextManager:
        """Matrix products in `precision`, as in training."""
        return self.accelerator.autocast()

    @property
    def offloads_activations(self) -> bool:
        """On a GPU, where it is asked for; on a CPU they are in the host's memory."""
        return self.config.parallel.offloads_activations and self.device.type == "cuda"

    @property
    def offloads_parameters(self) -> bool:
        """On a GPU, where it is asked for."""
        return self.config.parallel.offloads_parameters and self.device.type == "cuda"

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"

    def peak_memory_gib(self) -> float:
        """The largest memory any rank has held so far, GiB: of the GPU, else of the process."""
        return max(self.processes.gather(_peak_bytes(self.device))) / 2**30


def _choose_backend(backend: str, processes: Processes) -> None:
    try:
        chosen = select.use(backend)
    except ValueError as fault:
        raise UserError(f"quant.{fault}") from None
    if processes.is_main:
        logger.info("quant.backend=%s: %s", backend, chosen)


def _check(config: RunConfig, strategy: str, precision: str, device: torch.device) -> None:
    """Raises UserError for keys that do not fit the strategy or the device."""
    offload = config.parallel.offload
    if config.task == "finetune":
        check_optimizer(config.optim, strategy, precision, device)
    if strategy == "zero3" and precision == "fp16":
        raise UserError(
            "train.precision=fp16: parallel.strategy=zero3 does not scale gradients here; use "
            "bf16, or fsdp2."
        )
    if strategy == "zero3" and config.train.on_nonfinite != "stop":
        raise UserError(
            f"train.on_nonfinite={config.train.on_nonfinite}: DeepSpeed steps before it tells the "
            "gradient's norm; under parallel.strategy=zero3 use stop, or fsdp2."
        )
    if strategy == "zero3" and config.adapter.dtype == "bf16":
        raise UserError(
            "adapter.dtype=bf16: DeepSpeed keeps fp32 copies and moments of what it trains, so "
            "nothing is saved under parallel.strategy=zero3; use fp32, or fsdp2."
        )
    if config.parallel.offloads_parameters and strategy != "fsdp2":
        raise UserError(
            f"parallel.offload={offload}: parameters are offloaded by parallel.strategy=fsdp2, not "
            f"{strategy}; use fsdp2, or offload=activations."
        )
    if offload != "none" and device.type != "cuda":
        logger.warning("parallel.offload=%s: does nothing on a CPU", offload)


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
