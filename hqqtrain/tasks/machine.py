"""The machine of task=plan: its GPUs, or the CPU of this machine."""

from dataclasses import dataclass, replace

import torch

from hqqtrain.common.errors import UserError
from hqqtrain.common.gpus import GPUS, Gpu, find_gpu, gpu_of_device
from hqqtrain.config.groups import AUTO
from hqqtrain.config.run import RunConfig
from hqqtrain.loading.memory_check import free_host_memory
from hqqtrain.loading.time_estimate import GPUS_PER_NODE

OUTSIDE_BYTES = int(0.85 * 2**30)
"""Bytes of a GPU that PyTorch's allocator does not have: CUDA and its kernels. They were 0.82 GiB
on an H200 (`kernels/bench/results/memory.csv`)."""

_SAME_SIZE = 0.1
"""Largest relative difference of the memory of a GPU from a size that stands for it."""


@dataclass(frozen=True)
class Machine:
    """The devices of a training, which need not exist.

    Attributes:
        name: Name of the GPU, or its memory as the user gave it, or `CPU`.
        ranks: Number of processes, one for each GPU.
        usable: Bytes that the tensors of a rank can take.
        gpu: The GPU of each rank; None for a CPU.
    """

    name: str
    ranks: int
    usable: int
    gpu: Gpu | None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def nodes(self) -> int:
        """Number of nodes, with as many GPUs as usual."""
        return -(-self.ranks // GPUS_PER_NODE)

    def kinds(self) -> dict[str, Gpu]:
        """Return name -> GPU whose speed counts: its own, or those with the memory that is given.

        A CPU and an unknown GPU have none.
        """
        if self.gpu is None:
            return {}
        if self.gpu.flops is not None:
            return {self.name: self.gpu}
        memory = self.gpu.memory
        return {n: kind for n, kind in GPUS.items() if abs(kind.memory / memory - 1) < _SAME_SIZE}

    def __str__(self) -> str:
        return f"{self.ranks} x {self.name}" if self.gpu else self.name


def find_machine(config: RunConfig) -> Machine:
    """Return the machine of `plan.gpu` and `plan.gpus`.

    Raises:
        UserError: Several GPUs of this machine are asked for, which has none.
    """
    wanted, launch = config.plan.gpu, config.launch
    of_job = launch.nodes * launch.processes_per_node if launch.backend == "slurm" else None
    ranks = config.plan.gpus or of_job
    if wanted != AUTO:
        return gpu_machine(wanted, ranks or 1)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = gpu_of_device(properties.name) or Gpu(0)
        gpu = replace(gpu, memory=properties.total_memory)
        return _of_gpu(properties.name, gpu, ranks or torch.cuda.device_count())
    if ranks and ranks > 1:
        raise UserError(
            f"plan.gpu=auto: this machine has no GPU; for {ranks} GPUs, name their kind, as in "
            "plan.gpu=H100 or plan.gpu=24GB."
        )
    return Machine("CPU", 1, free_host_memory(), None)


def gpu_machine(name: str, ranks: int = 1) -> Machine:
    """Return the machine with `ranks` GPUs of a kind, or of a size, that `find_gpu` knows."""
    gpu = find_gpu(name)
    assert gpu is not None, name  # `PlanConfig.errors` has refused it
    return _of_gpu(name, gpu, ranks)


def _of_gpu(name: str, gpu: Gpu, ranks: int) -> Machine:
    return Machine(name, ranks, max(0, gpu.memory - OUTSIDE_BYTES), gpu)
