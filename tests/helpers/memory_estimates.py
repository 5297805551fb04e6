"""Memory estimates of models on the meta device, for tests of `hqqtrain.loading`."""

import torch
from peft import PeftModel, get_peft_model

from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.strategies.registry import STRATEGIES
from hqqtrain.loading.memory_check import AvailableMemory
from hqqtrain.loading.memory_estimate import MemoryEstimate, estimate_memory
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.source import shipped_folder
from hqqtrain.nn.lora import lora_config
from hqqtrain.nn.replace import quantize_model
from hqqtrain.tasks.resources import workload_of

GIB = 2**30
PLENTY = AvailableMemory(host=1 << 50, disk=1 << 50)


def meta_model(name: str, config: RunConfig) -> PeftModel:
    """Build the architecture `name`, quantized and with adapters, on the meta device."""
    model = build_meta(load_hf_config(shipped_folder(name)))
    quantize_model(model, config.quant)
    return get_peft_model(model, lora_config(config.adapter, model), low_cpu_mem_usage=True)


def two_bit_config(**groups: object) -> RunConfig:
    """Return a configuration of 2 bits and adapters of rank 16, without calibration.

    `groups` are other groups of it.
    """
    quant = QuantConfig(nbits=2, group_size=64, calibration=None)
    return RunConfig(quant=quant, adapter=AdapterConfig(r=16), **groups)  # type: ignore[arg-type]


def estimate(
    config: RunConfig, model: torch.nn.Module, dtype: torch.dtype, world_size: int = 1,
    strategy: str = "single", **settings: bool,
) -> MemoryEstimate:  # fmt: skip
    """Estimate the memory of `config`; `settings` are those of `workload_of`."""
    workload = workload_of(config, **settings)
    return estimate_memory(
        workload, model, STRATEGIES[strategy](SINGLE_PROCESS), dtype=dtype, world_size=world_size
    )
