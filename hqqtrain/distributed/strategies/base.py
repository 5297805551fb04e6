"""The interface of a parallel strategy.

Each strategy is a class in a file of this package, and `registry.py` lists them. The rest of the
program asks the object for its attributes and never compares its name.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.conflicts import PAGED_OPTIMIZERS, Conflict
from hqqtrain.distributed.comm import Communicator

STORAGE_DTYPES = {
    "uint8": torch.uint8,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
"""Dtypes of `quant.storage_dtype`."""

BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", *PAGED_OPTIMIZERS)
"""The values of `optim.name` that bitsandbytes implements."""


@dataclass(frozen=True)
class Capabilities:
    """The settings that a strategy may be combined with; `check_supported` reads them.

    Attributes:
        several_processes: Whether more than one process may run.
        meta_offload: Whether `quant.offload_meta=true` works.
        parameter_offload: The tasks for which `parallel.offload=parameters` works: all of them, or
            those that do not train.
        hsdp: Whether `parallel.hsdp` works.
        package: Python package that the strategy needs, which is also the name of our extra for
            `pip install`; empty for none.
        conflicts: Values of other keys that the strategy does not support.
    """

    several_processes: bool = True
    meta_offload: bool = False
    parameter_offload: Literal["never", "without training", "always"] = "never"
    hsdp: bool = False
    package: str = ""
    conflicts: tuple[Conflict, ...] = ()


@dataclass(eq=False)
class Strategy:
    """Shards a model over the ranks, or replicates it.

    The methods of this class leave the model full and unwrapped; strategies override them.

    Attributes:
        name: The value of `parallel.strategy`.
        supports: What the strategy may be combined with.
        engine: The implementation of the training step that the strategy needs.
        uses_ddp: Whether the engine averages the gradients of the adapters with PyTorch's DDP.
        shards_parameters: Whether each rank has only a part of the frozen parameters.
        shards_adapters: Whether each rank has only a part of the trained parameters.
        frees_parameters: Whether parameters are empty between their uses, so their shapes change.
        may_call_head_alone: Whether the output head may be called by itself, a different number of
            times on each rank, as the chunked loss does.
        comm: All ranks of the run.
        storage_dtype: Dtype that W_q is viewed as, from `resolve_storage_dtype`.
        replicas: Number of replicas of the sharded model, see `parallel.hsdp`.
        offloads_parameters: Whether a GPU keeps the parameters in host memory between their uses;
            always false on a CPU.
        offloads_meta: Whether a GPU keeps scale and zero in host memory; always false on a CPU.
    """

    name: ClassVar[str]
    supports: ClassVar[Capabilities] = Capabilities()
    engine: ClassVar[Literal["torch", "deepspeed"]] = "torch"
    uses_ddp: ClassVar[bool] = False
    shards_parameters: ClassVar[bool] = False
    shards_adapters: ClassVar[bool] = False
    frees_parameters: ClassVar[bool] = False
    may_call_head_alone: ClassVar[bool] = True

    comm: Communicator
    storage_dtype: torch.dtype = torch.uint8
    replicas: int = 1
    offloads_parameters: bool = False
    offloads_meta: bool = False

    @classmethod
    def resolve_storage_dtype(cls, wanted: str, compute: torch.dtype) -> torch.dtype:
        """Resolve `quant.storage_dtype`, the dtype that W_q is viewed as; `auto` is uint8.

        Args:
            wanted: A value of `quant.storage_dtype` that the strategy supports.
            compute: Dtype of the parameters that are not quantized.
        """
        return torch.uint8 if wanted == "auto" else STORAGE_DTYPES[wanted]

    def check_model(self, model: nn.Module) -> None:
        """Check that the strategy can run `model`, quantized and on any device.

        Raises:
            UserError: The strategy cannot; the message names the parameter and what to change.
        """
        scalar = next((name for name, param in model.named_parameters() if not param.dim()), None)
        if scalar is not None and self.shards_parameters:
            raise UserError(
                f"parallel.strategy={self.name}: {scalar} is a scalar parameter, which has no rows "
                "to shard; use parallel.strategy=ddp."
            )

    def shard(self, model: nn.Module) -> None:
        """Shard `model` for loading, in place, while its parameters are on meta. Collective."""

    def host_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of `model` that stay in host memory when it is loaded."""
        return list(model.parameters()) if self.offloads_parameters else []

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap a loaded model so that it can be called. Collective.

        The flat strategies take ownership of the parameters: afterwards only the parameters of the
        adapters can be gathered. The other strategies return `model` itself.
        """
        return model

    def roundtrip(self, weight: Tensor) -> Tensor:
        """Return `weight` as the model would see it after sharding and gathering. Collective."""
        return weight

    def parameter_shards(self, world_size: int) -> int:
        """Return into how many parts the frozen parameters are split on `world_size` ranks."""
        return world_size // self.replicas if self.shards_parameters else 1

    def adapter_shards(self, world_size: int) -> int:
        """Return into how many parts adapters, their gradients and optimizer state are split."""
        return world_size // self.replicas if self.shards_adapters else 1

    def gathered_bytes(self, world_size: int, *, root: int, layers: int, itemsize: int) -> int:
        """Return the bytes of gathered parameters on the device, in addition to the rank's shard.

        The parameters outside of decoder layers, such as embeddings, stay gathered from the first
        step on.

        Args:
            world_size: Number of ranks.
            root: Bytes of the parameters outside of decoder layers.
            layers: Bytes of the frozen parameters of decoder layers.
            itemsize: Bytes of an element of the unquantized weights.
        """
        shards = self.parameter_shards(world_size)
        return root * (shards - 1) // shards


def storage_dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` in `quant.storage_dtype`."""
    return next(name for name, value in STORAGE_DTYPES.items() if value == dtype)


def ensure_process_group(world_size: int) -> None:
    """Create a process group for a single process that no launcher has started.

    FSDP2 needs a process group even then. With several processes, the launcher's exists already.
    """
    if world_size == 1 and not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)


def probe_layer(weight: Tensor) -> nn.Module:
    """Return a layer with `weight` as its frozen parameter `W_q` next to trained parameters."""
    module = nn.Linear(1, 1, device=weight.device)
    module.register_parameter("W_q", nn.Parameter(weight.clone(), requires_grad=False))
    return module
