"""The runtime that all tasks of a run share: ranks, device, precision and strategy, resolved."""

import logging
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from hqqtrain.common.env import get_local_world_size
from hqqtrain.common.errors import UserError
from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.accelerate_env import reconcile_accelerate_config
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.precision import resolve_precision, resolve_training_precision
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.rendezvous import listen_on_master_address
from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.distributed.strategies.check import RuntimeSettings, check_supported
from hqqtrain.distributed.strategies.fsdp2 import count_replicas
from hqqtrain.distributed.strategies.registry import resolve_strategy
from hqqtrain_kernels import backend as kernel_backend

logger = logging.getLogger(__name__)

PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)
"""Time-out of collectives: the other ranks wait while rank 0 writes a large model."""

PRECISION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of `train.precision`."""


@dataclass(frozen=True)
class Runtime:
    """Runtime of one process. It is created once, after the configuration was checked.

    Attributes:
        comm: All ranks of the run.
        accelerator: Gradient scaling of `precision`.
        strategy: How the model is sharded or replicated.
        precision: Name of the dtype of matrix products, as in `train.precision`.
        training_precision: The same in training, where it may be bf16 on a CPU.
        offloads_activations: Whether activations are offloaded to host memory.
        preemption: Knows whether this rank was asked to stop.
    """

    comm: Communicator
    accelerator: Accelerator
    strategy: Strategy
    precision: str
    training_precision: str
    offloads_activations: bool
    preemption: PreemptionHandler

    @classmethod
    def start(cls, settings: RuntimeSettings, preemption: PreemptionHandler) -> "Runtime":
        """Join the process group, if any, and resolve the settings that are `auto`. Collective.

        Args:
            settings: The settings to resolve and to check.
            preemption: Knows whether this rank was asked to stop.

        Raises:
            UserError: Settings contradict each other, or do not fit the machine or the number of
                processes.
        """
        parallel, quant = settings.parallel, settings.quant
        strategy_name, asked = reconcile_accelerate_config(os.environ, parallel, settings.train)
        precision, training_precision = resolve_precision(asked), resolve_training_precision(asked)
        offloads_meta = quant.quantizes and quant.offload_meta
        offloads = parallel.offloads_parameters or offloads_meta
        accelerator = _start_accelerator(precision, offloads)
        comm = Communicator(
            accelerator.process_index, accelerator.num_processes, accelerator.device
        )
        strategy_class = resolve_strategy(strategy_name, comm)
        on_gpu = comm.device.type == "cuda"
        check_supported(
            strategy_class,
            settings,
            precision=precision,
            device=comm.device.type,
            world_size=comm.size,
        )
        if parallel.offload != "none" and not on_gpu:
            logger.warning("parallel.offload=%s: has no effect on a CPU", parallel.offload)
        checkpointing = settings.train.activation_checkpointing
        if settings.trains and checkpointing == "offload" and not on_gpu:
            logger.warning("train.activation_checkpointing=offload: means full on a CPU")
        if offloads_meta and not on_gpu:
            logger.warning("quant.offload_meta=true: has no effect on a CPU")
        if quant.quantizes:
            _select_backend(quant, comm)
        replicas = 1
        if parallel.hsdp:
            replicas = count_replicas(comm.all_gather_object(get_local_world_size()))
        strategy = _build_strategy(strategy_class, settings, comm, precision, replicas)
        offloads_activations = on_gpu and checkpointing == "offload"
        return cls(
            comm, accelerator, strategy, precision, training_precision, offloads_activations,
            preemption,
        )  # fmt: skip

    def on_devices(
        self, settings: RuntimeSettings, comm: Communicator, precision: str, nodes: int
    ) -> "Runtime":
        """Return the runtime of a training on other devices, which need not exist.

        Args:
            settings: The settings of the training.
            comm: Number and type of the devices.
            precision: A value of `train.precision` but `auto`.
            nodes: Number of nodes, each of which has a replica under `parallel.hsdp=true`.

        Raises:
            UserError: Settings contradict each other, or do not fit the devices.
        """
        strategy_class = resolve_strategy(settings.parallel.strategy, comm)
        device = comm.device.type
        check_supported(
            strategy_class, settings, precision=precision, device=device, world_size=comm.size
        )
        replicas = nodes if settings.parallel.hsdp else 1
        strategy = _build_strategy(strategy_class, settings, comm, precision, replicas)
        return replace(
            self, comm=comm, strategy=strategy, precision=precision, training_precision=precision,
            offloads_activations=device == "cuda"
            and settings.train.activation_checkpointing == "offload",
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of unquantized weights and of matrix products."""
        return PRECISION_DTYPES[self.precision]

    @property
    def training_dtype(self) -> torch.dtype:
        """Dtype of matrix products in training."""
        return PRECISION_DTYPES[self.training_precision]

    @property
    def device(self) -> torch.device:
        return self.comm.device

    def autocast(self) -> AbstractContextManager:
        """Context for matrix products in `precision`."""
        return self._autocast_to(self.dtype)

    def training_autocast(self) -> AbstractContextManager:
        """Context for matrix products in `training_precision`."""
        return self._autocast_to(self.training_dtype)

    def _autocast_to(self, dtype: torch.dtype) -> AbstractContextManager:
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype that W_q is viewed as."""
        return self.strategy.storage_dtype

    @property
    def offloads_parameters(self) -> bool:
        """Whether a GPU keeps the parameters in host memory between their uses."""
        return self.strategy.offloads_parameters

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"

    def peak_memory_gib(self) -> float:
        """Return the largest `peak_memory_bytes` of any rank so far, in GiB. Collective."""
        return max(self.comm.all_gather_object(peak_memory_bytes(self.device))) / 2**30


def _build_strategy(
    strategy_class: type[Strategy], settings: RuntimeSettings, comm: Communicator, precision: str,
    replicas: int,
) -> Strategy:  # fmt: skip
    quant, on_gpu = settings.quant, comm.device.type == "cuda"
    compute_dtype = PRECISION_DTYPES[precision]
    return strategy_class(
        comm,
        storage_dtype=strategy_class.resolve_storage_dtype(quant.storage_dtype, compute_dtype),
        replicas=replicas,
        offloads_parameters=on_gpu and settings.parallel.offloads_parameters,
        offloads_meta=on_gpu and quant.quantizes and quant.offload_meta,
    )


def _start_accelerator(precision: str, offloads: bool) -> Accelerator:
    """Join the process group that the launcher has prepared, if any."""
    listen_on_master_address()
    cuda = torch.cuda.is_available()
    # Parameters on the host are sent, and their gradients reduced, there, which needs gloo, too.
    # accelerate takes a backend as the sign that a launcher has started several processes.
    backend = "cuda:nccl,cpu:gloo" if cuda and offloads and "LOCAL_RANK" in os.environ else None
    group = InitProcessGroupKwargs(backend=backend, timeout=PROCESS_GROUP_TIMEOUT)
    mixed_precision = "no" if precision == "fp32" else precision
    return Accelerator(cpu=not cuda, mixed_precision=mixed_precision, kwargs_handlers=[group])


def _select_backend(quant: QuantConfig, comm: Communicator) -> None:
    """Select the implementation of `quant.backend`, for all models of this process.

    A backend for inference takes over single layers later, and logs that itself.
    """
    try:
        selected = kernel_backend.set_backend("auto" if quant.inference_backend else quant.backend)
    except ValueError as error:
        raise UserError(f"quant.{error}") from None
    if comm.is_main and not quant.inference_backend:
        logger.info("quant.backend=%s: %s", quant.backend, selected)


_EARLIER_PEAKS: dict[torch.device, int] = {}
"""Peak memory of each GPU in bytes before the last call of `reset_recent_peak`."""


def reset_recent_peak(device: torch.device) -> None:
    """Let the allocator of a GPU measure its peak anew; `peak_memory_bytes` keeps the earlier."""
    _EARLIER_PEAKS[device] = peak_memory_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank in bytes: of its GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(device), _EARLIER_PEAKS.get(device, 0))
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit
