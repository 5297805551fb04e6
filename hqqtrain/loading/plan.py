"""Plan the model of a run from shapes alone: no weight is read and no file is written.

`plan_model` finds every fault of the model, the checkpoint, the module patterns and the adapter
before a long task begins. It takes seconds for a model of any size.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.common.text import count
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.groups import AUTO, EvalConfig
from hqqtrain.config.model import ModelConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.runtime import PRECISION_DTYPES, Runtime
from hqqtrain.formats.quantized_settings import source_settings
from hqqtrain.loading.initial_adapter import (
    InitialAdapter,
    add_adapter,
    load_initial_adapter,
    unknown_base_warning,
)
from hqqtrain.loading.model_check import check_called_linears, check_runnable, check_stored_dtypes
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.embedding_rows import add_embedding_rows, check_head_is_dense
from hqqtrain.models.foreign.reader import ForeignReader
from hqqtrain.models.fqn import base_model, expected_shapes, strip_wrappers, tied_names
from hqqtrain.models.layerwise import probe_layerwise
from hqqtrain.models.packing_probe import PackingProbe, probe_packing
from hqqtrain.models.source import ModelSource, resolve_source
from hqqtrain.models.weights.safetensors import SafetensorsReader
from hqqtrain.models.weights.synthetic import SyntheticReader, open_weight_source
from hqqtrain.nn.base_linears import base_linears, linear_shapes
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import cast_adapters
from hqqtrain.nn.replace import quantize_model, replace_linears
from hqqtrain.quant.solvers.registry import SOLVERS

logger = logging.getLogger(__name__)


@dataclass
class ModelPlan:
    """The model of a run on the meta device, and the source of its weights.

    Attributes:
        source: The folder of the model and the kind of its weights.
        hf_config: The configuration of the model, without quantization.
        reader: Reads the weights of `source`.
        model: The model on meta, with its quantized linears and its adapters in place.
        lora: Configuration of the adapters; None if the model has none.
        initial_adapter: The existing adapter that gives the initial values, if any; see
            `load_initial_adapter`.
        packing: Whether packed texts stay apart; None if the task does not call the model.
        calibrates: Whether the linears of decoder layers are quantized with calibration text.
    """

    source: ModelSource
    hf_config: PretrainedConfig
    reader: SafetensorsReader | SyntheticReader
    model: nn.Module
    lora: LoraConfig | None
    initial_adapter: InitialAdapter | None
    packing: PackingProbe | None = None
    calibrates: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether the source has packed weights, so that nothing is left to quantize."""
        return self.source.kind == "quantized"

    def source_dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of tensor `name` in the source, or None if the source lacks it."""
        return self.reader.dtype(name) if name in self.reader else None

    @property
    def source_bits(self) -> int:
        """Bits of a weight in the dense source; the first linear stands for all."""
        name = strip_wrappers(next(iter(base_linears(self.model))))
        return 8 * self.reader.dtype(f"{name}.weight").itemsize

    @property
    def num_linears(self) -> int:
        """Number of linears that are quantized, or with `quant.nbits=null` would be."""
        return len(base_linears(self.model))


@dataclass(frozen=True)
class PlanSettings:
    """The parts of the configuration that decide the structure of a model.

    Attributes:
        max_seq_len: Longest sequence of the training, for a warning.
        evaluation: The group `eval`, if the task evaluates the model.
        adapts: Whether to add a new adapter for training. Otherwise the model gets an adapter only
            if one exists already.
        executes: Whether the task calls the model. Tasks that only save it can use every strategy.
        has_weights: Whether to find the weights and check them. Otherwise config.json is enough.
        activation_checkpointing: `train.activation_checkpointing` if the model is trained.
        prepare_tokenizer: Returns a source with the tokenizer that the run uses.
    """

    model: ModelConfig
    quant: QuantConfig
    adapter: AdapterConfig
    max_seq_len: int
    adapts: bool
    executes: bool
    evaluation: EvalConfig | None = None
    activation_checkpointing: str | int = "none"
    has_weights: bool = True
    prepare_tokenizer: Callable[[ModelSource], ModelSource] = lambda source: source


def plan_model(
    settings: PlanSettings, runtime: Runtime, *, resumed: Path | None = None
) -> ModelPlan:
    """Build the model on the meta device and check the checkpoint against it.

    Args:
        settings: What the configuration says about the model.
        runtime: Dtypes, device and strategy of the run.
        resumed: Folder of a training checkpoint whose adapter gives the initial values.

    Raises:
        UserError: The model, the checkpoint, a pattern or the adapter has a fault.
    """
    source = settings.prepare_tokenizer(
        resolve_source(settings.model, weights=settings.has_weights)
    )
    hf_config = load_hf_config(source.path)
    model: nn.Module = build_dense(source, hf_config, runtime.dtype)
    # A packed checkpoint has the tensors of quantized linears. A dense one is checked before they
    # are quantized, so that its faults come before those of the settings of its linears.
    if source.kind == "quantized":
        _replace_linears(model, source, settings.quant, runtime)
    reader: SafetensorsReader | SyntheticReader
    if settings.has_weights:
        reader = _open_checked(source, hf_config, model, runtime)
    else:
        reader = SyntheticReader(expected_shapes(model), runtime.dtype, runtime.device)
    calibrates = False
    if source.kind != "quantized":
        quant = _quant_settings(settings, hf_config, model, runtime)
        _replace_linears(model, source, quant, runtime)
        calibrates = _calibrates(quant, model)
    start = load_initial_adapter(
        settings.adapter, source, resumed, linear_shapes(model), expected_shapes(model)
    )
    if start and source.kind == "quantized" and not source.foreign:
        start.adapter.check_base(source_settings(source).fingerprint, start.origin)
    if start and not resumed and runtime.comm.is_main:
        _log_start(start, source, adapts=settings.adapts)
    packing = None
    if settings.executes:
        check_runnable(
            model,
            settings.max_seq_len,
            activation_checkpointing=settings.activation_checkpointing,
            evaluation=settings.evaluation,
        )
        packing = probe_packing(hf_config, model, trains=settings.adapts)
        check_called_linears(model, packing.read_linears, settings.quant.skip)
    lora = None
    if start or settings.adapts:
        model, lora = add_adapter(
            base_model(model),
            settings.adapter,
            start,
            source.trained_token_ids,
            adapts=settings.adapts,
        )
        cast_adapters(model, PRECISION_DTYPES[settings.adapter.dtype])
    else:
        model.requires_grad_(False)
    if settings.executes:
        runtime.strategy.check_model(model)
    return ModelPlan(source, hf_config, reader, model, lora, start, packing, calibrates)


def _log_start(start: InitialAdapter, source: ModelSource, *, adapts: bool) -> None:
    """Log which adapter is loaded, and whether it may be one of another base."""
    logger.info("%s the adapter in %s", "starting from" if adapts else "loading", start.folder)
    if warning := unknown_base_warning(start, source):
        logger.warning(warning)


def _calibrates(quant: QuantConfig, model: nn.Module) -> bool:
    """Return whether linears of the decoder layers are quantized with calibration text."""
    solvers = {m.spec.solver for m in model.modules() if isinstance(m, HQQLinear)}
    return quant.calibration is not None and any(SOLVERS[name].calibrates for name in solvers)


def _quant_settings(
    settings: PlanSettings, hf_config: PretrainedConfig, model: nn.Module, runtime: Runtime
) -> QuantConfig:
    """Return `settings.quant`, without calibration where `auto` cannot calibrate the model.

    Raises:
        UserError: The decoder layers cannot be run one after the other, although the run needs
            that. The message has a line for each key that needs it.
    """
    quant, evaluation, needs = settings.quant, settings.evaluation, {}
    if quant.calibrates:
        key = f"quant.calibration={quant.calibration}"
        needs[key] = "quant.calibration=null and quant.solver=auto"
    if evaluation and evaluation.streams_reference and quant.quantizes:
        needs[f"eval.reference={evaluation.reference}"] = "eval.reference=resident or off"
    reason = probe_layerwise(hf_config, model) if needs else ""
    if not reason:
        return quant
    fault = f"needs the decoder layers one after the other, but {type(model).__name__} {reason}."
    if quant.calibrates and (quant.calibration, quant.solver) == (AUTO, AUTO):
        del needs[key]
        quant = replace(quant, calibration=None)
        if runtime.comm.is_main:
            logger.warning("%s: %s The model is quantized without text.", key, fault)
    if needs:
        raise UserError("\n".join(f"{key}: {fault} Set {fix}." for key, fix in needs.items()))
    return quant


def build_dense(
    source: ModelSource, hf_config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Build the model on the meta device, with rows for the tokens that were added."""
    model = build_meta(hf_config, dtype)
    if not source.trained_token_ids:
        return model
    if source.kind == "quantized":
        check_head_is_dense(model, source_settings(source).modules)
    return add_embedding_rows(hf_config, model, source.trained_token_ids, dtype)


def _open_checked(
    source: ModelSource, hf_config: PretrainedConfig, model: nn.Module, runtime: Runtime
) -> SafetensorsReader | SyntheticReader:
    """Open the source of the weights of `model`, and check names, shapes and dtypes.

    Parameters that are stored in spite of a tie are untied in `model` and in `hf_config`.
    """
    was_tied = bool(tied_names(model))
    reader = open_weight_source(source, model, runtime.device)
    if was_tied and not tied_names(model):
        hf_config.tie_word_embeddings = False
    unused = reader.check(expected_shapes(model, packed=source.kind == "quantized"))
    check_stored_dtypes(model, reader, unused)
    if isinstance(reader, ForeignReader) and runtime.comm.is_main:
        for note in reader.notes:
            logger.info("%s: %s", source.name, note)
    if unused and runtime.comm.is_main:
        logger.warning(
            "%s: not used: %s, such as %s", source.path, count(len(unused), "tensor"), unused[0]
        )
    return reader


def _replace_linears(
    model: nn.Module, source: ModelSource, quant: QuantConfig, runtime: Runtime
) -> None:
    """Replace linears by quantized ones, as the packed checkpoint or `quant.*` says."""
    name = quant.compute_dtype
    compute_dtype = runtime.dtype if name == "auto" else PRECISION_DTYPES[name]
    dtypes: Any = {"compute_dtype": compute_dtype, "storage_dtype": runtime.storage_dtype}
    if source.kind == "quantized":
        if not quant.quantizes:
            raise UserError(
                f"quant.nbits=null: the weights of model.name_or_path={source.name} are quantized "
                "already; name the full-precision model, or leave out quant.nbits."
            )
        settings = source_settings(source)
        settings.check_model(model, source.path / "config.json")
        if source.foreign and runtime.comm.is_main:
            logger.info(
                "plan: %s are taken over as %s has quantized them",
                count(len(settings.modules), "linear layer"), source.foreign,
            )  # fmt: skip
        specs = {name: one.spec for name, one in settings.modules.items()}
        replace_linears(model, specs, **dtypes)
    else:
        report = quantize_model(model, quant, **dtypes)
        if runtime.comm.is_main and not quant.quantizes:
            dense = count(len(report.dense), "linear layer")
            logger.info("plan: quant.nbits=null keeps %s for adapters in full precision", dense)
        elif runtime.comm.is_main:
            logger.info(
                "plan: %s with %.1f %% of the weights to quantize; %d to keep in full precision",
                count(len(report.quantized), "linear layer"), 100 * report.share,
                len(report.skipped),
            )  # fmt: skip
