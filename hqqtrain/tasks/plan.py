"""Plan the model of a run from shapes alone: no weight is read and no file is written.

`make_plan` finds every fault of the model, the checkpoint, the patterns and the adapter before the
work begins. It takes seconds for a model of any size.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig

from hqqtrain.ckpt import quantized_settings
from hqqtrain.dist import FLAT, check_flat
from hqqtrain.models import (
    CheckpointReader,
    Source,
    SyntheticReader,
    base_model,
    build_meta,
    config_of,
    expected_shapes,
    open_weights,
    resolve_source,
)  # fmt: skip
from hqqtrain.nn import (
    HQQLinear,
    cast_adapters,
    lora_config,
    quantize_model,
    replace_linears,
    with_packed_linears,
)  # fmt: skip
from hqqtrain.tasks.adapters import Start, check_start, load_start, unknown_base
from hqqtrain.train.session import DTYPES, Session

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """The model of a run on the meta device, and the source of its weights."""

    source: Source
    hf_config: PretrainedConfig
    reader: CheckpointReader | SyntheticReader
    """Reads the weights of `source`."""
    model: nn.Module
    """Its linears are replaced by quantized ones, and its adapters are in place."""
    lora: LoraConfig | None
    """Configuration of the adapters; None if the model has none."""
    start: Start | None
    """The existing adapter that gives the initial values, if any; see `load_start`."""

    @property
    def packed(self) -> bool:
        """Whether the source has packed weights, so that nothing is left to quantize."""
        return self.source.kind == "quantized"

    @property
    def layers(self) -> int:
        """Number of quantized linears."""
        return sum(isinstance(module, HQQLinear) for module in self.model.modules())


def make_plan(session: Session, *, adapt: bool, resumed: Path | None = None) -> Plan:
    """Build the model on the meta device and check the checkpoint against it.

    Args:
        session: Configuration, dtypes and device of the run.
        adapt: Whether to add a new adapter for training. Otherwise the model gets an adapter only
            if one exists already.
        resumed: Folder of a training checkpoint whose adapter gives the initial values.

    Raises:
        UserError: The model, the checkpoint, a pattern or the adapter has a fault.
    """
    config = session.config
    source = resolve_source(config.model)
    hf_config = config_of(source.path)
    model: nn.Module = build_meta(hf_config, session.dtype)
    _replace_linears(model, source, session)
    reader = open_weights(source, model, session.device)
    unused = reader.check(expected_shapes(model, packed=source.kind == "quantized"))
    if unused and session.processes.is_main:
        logger.warning(
            "%s: %d tensors are not used, such as %s", source.path, len(unused), unused[0]
        )
    start = load_start(config, source, resumed)
    if start and not resumed and session.processes.is_main:
        logger.info("starting from the adapter in %s", start.folder)
        if warning := unknown_base(start, source):
            logger.warning(warning)
    lora = with_packed_linears(start.adapter.config) if start else None
    if adapt:
        lora = lora_config(config.adapter, model)
        check_start(start, lora)
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
        cast_adapters(model, DTYPES[config.adapter.dtype])
    else:
        model.requires_grad_(False)
    # Only these tasks run the model; the others save it without `mount`.
    if session.strategy in FLAT and config.task in ("finetune", "eval"):
        check_flat(model, session.storage, session.strategy)
    return Plan(source, hf_config, reader, model, lora, start)


def _replace_linears(model: nn.Module, source: Source, session: Session) -> None:
    """Replace linears by quantized ones, as the packed checkpoint or `quant.*` says."""
    compute = session.config.quant.compute_dtype
    compute_dtype = session.dtype if compute == "auto" else DTYPES[compute]
    dtypes: dict[str, Any] = {"compute_dtype": compute_dtype, "storage_dtype": session.storage}
    if source.kind == "quantized":
        modules = quantized_settings(source.path).modules
        replace_linears(model, {n: m.spec for n, m in modules.items()}, **dtypes)
    else:
        report = quantize_model(model, session.config.quant, **dtypes)
        if session.processes.is_main:
            logger.info(
                "%d linears are quantized, %.1f %% of the weights; %d stay in full precision",
                len(report.matched),
                100 * report.share,
                len(report.skipped),
            )
