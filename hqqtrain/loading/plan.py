"""Plan the model of a run from shapes alone: no weight is read and no file is written.

`plan_model` finds every fault of the model, the checkpoint, the patterns and the adapter before the
work begins. It takes seconds for a model of any size.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig

from hqqtrain.distributed.runtime import PRECISION_DTYPES, Runtime
from hqqtrain.distributed.strategies.base import FLAT_STRATEGIES
from hqqtrain.distributed.strategies.row_sharding import check_flat_storage
from hqqtrain.formats.packed import quantized_settings
from hqqtrain.loading.initial_adapter import (
    InitialAdapter,
    check_initial_adapter,
    load_initial_adapter,
    unknown_base_warning,
)
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.fqn import base_model, expected_shapes
from hqqtrain.models.source import ModelSource, resolve_source
from hqqtrain.models.weights.safetensors import SafetensorsReader
from hqqtrain.models.weights.synthetic import SyntheticReader, open_weight_source
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import cast_adapters, lora_config, register_hqq_linear
from hqqtrain.nn.replace import quantize_model, replace_linears

logger = logging.getLogger(__name__)


@dataclass
class ModelPlan:
    """The model of a run on the meta device, and the source of its weights."""

    source: ModelSource
    hf_config: PretrainedConfig
    reader: SafetensorsReader | SyntheticReader
    """Reads the weights of `source`."""
    model: nn.Module
    """Its linears are replaced by quantized ones, and its adapters are in place."""
    lora: LoraConfig | None
    """Configuration of the adapters; None if the model has none."""
    start: InitialAdapter | None
    """The existing adapter that gives the initial values, if any; see `load_initial_adapter`."""

    @property
    def packed(self) -> bool:
        """Whether the source has packed weights, so that nothing is left to quantize."""
        return self.source.kind == "quantized"

    def source_dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of tensor `name` in the source, or None if the source lacks it."""
        return self.reader.dtype(name) if name in self.reader else None

    @property
    def layers(self) -> int:
        """Number of quantized linears."""
        return sum(isinstance(module, HQQLinear) for module in self.model.modules())


def plan_model(runtime: Runtime, *, adapt: bool, resumed: Path | None = None) -> ModelPlan:
    """Build the model on the meta device and check the checkpoint against it.

    Args:
        session: Configuration, dtypes and device of the run.
        adapt: Whether to add a new adapter for training. Otherwise the model gets an adapter only
            if one exists already.
        resumed: Folder of a training checkpoint whose adapter gives the initial values.

    Raises:
        UserError: The model, the checkpoint, a pattern or the adapter has a fault.
    """
    config = runtime.config
    source = resolve_source(config.model)
    hf_config = load_hf_config(source.path)
    model: nn.Module = build_meta(hf_config, runtime.dtype)
    _replace_linears(model, source, runtime)
    reader = open_weight_source(source, model, runtime.device)
    unused = reader.check(expected_shapes(model, packed=source.kind == "quantized"))
    if unused and runtime.comm.is_main:
        logger.warning(
            "%s: %d tensors are not used, such as %s", source.path, len(unused), unused[0]
        )
    start = load_initial_adapter(config, source, resumed)
    if start and not resumed and runtime.comm.is_main:
        logger.info("starting from the adapter in %s", start.folder)
        if warning := unknown_base_warning(start, source):
            logger.warning(warning)
    lora = register_hqq_linear(start.adapter.config) if start else None
    if adapt:
        lora = lora_config(config.adapter, model)
        check_initial_adapter(start, lora)
    longest = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if longest and config.train.max_seq_len > longest:
        logger.warning(
            "train.max_seq_len=%d: the model was made for %d tokens at most",
            config.train.max_seq_len,
            longest,
        )
    if lora is not None:
        # low_cpu_mem_usage makes PEFT create the adapters on the meta device, too.
        model = get_peft_model(base_model(model), lora, low_cpu_mem_usage=True)
        cast_adapters(model, PRECISION_DTYPES[config.adapter.dtype])
    else:
        model.requires_grad_(False)
    # Only these tasks run the model; the others save it without `mount`.
    if runtime.strategy in FLAT_STRATEGIES and config.task in ("finetune", "eval"):
        check_flat_storage(model, runtime.storage, runtime.strategy)
    return ModelPlan(source, hf_config, reader, model, lora, start)


def _replace_linears(model: nn.Module, source: ModelSource, runtime: Runtime) -> None:
    """Replace linears by quantized ones, as the packed checkpoint or `quant.*` says."""
    compute = runtime.config.quant.compute_dtype
    compute_dtype = runtime.dtype if compute == "auto" else PRECISION_DTYPES[compute]
    dtypes: dict[str, Any] = {"compute_dtype": compute_dtype, "storage_dtype": runtime.storage}
    if source.kind == "quantized":
        modules = quantized_settings(source.path).modules
        replace_linears(model, {n: m.spec for n, m in modules.items()}, **dtypes)
    else:
        report = quantize_model(model, runtime.config.quant, **dtypes)
        if runtime.comm.is_main:
            logger.info(
                "%d linears are quantized, %.1f %% of the weights; %d stay in full precision",
                len(report.matched),
                100 * report.share,
                len(report.skipped),
            )
