"""From a configuration to a model that is ready: planned on shapes alone, then filled.

`make_plan` finds out everything that can be wrong without reading a weight or writing a file.
`build` shards, reads and quantizes; it is the same path for one process and for many. What it
leaves can be saved; `mount` makes it a model that runs.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig

from hqqtrain.ckpt import Fingerprint, QuantizedSettings, quantized_settings
from hqqtrain.config import RunConfig, UserError
from hqqtrain.dist import (
    FLAT,
    LoadReport,
    Processes,
    check_bits,
    check_flat,
    partition,
    shard,
    spread,
    wrap_layers,
)  # fmt: skip
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
from hqqtrain.train.adapters import Start, check_start, fill_adapters, load_start
from hqqtrain.train.filling import fill_model
from hqqtrain.train.session import DTYPES, Session

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """A model on meta, its linears replaced and its adapters in place, and where it comes from.

    `start`: the adapter to begin with, from `adapter.init_from` or the run that `model` names.
    """

    source: Source
    hf_config: PretrainedConfig
    reader: CheckpointReader | SyntheticReader
    model: nn.Module
    lora: LoraConfig | None
    start: Start | None

    @property
    def packed(self) -> bool:
        """Whether the source holds packed weights already."""
        return self.source.kind == "quantized"

    @property
    def layers(self) -> int:
        """How many quantized linears the model has."""
        return sum(isinstance(module, HQQLinear) for module in self.model.modules())


@dataclass
class Built:
    """The model, filled, and what filling it showed; the same on every rank."""

    model: nn.Module
    settings: QuantizedSettings
    layer_errors: dict[str, float]
    """Relative error by layer; empty where the weights came packed."""
    relative_error: float | None
    loading: list[LoadReport]
    """Of every rank."""

    @property
    def bytes_read(self) -> int:
        return sum(report.bytes_read for report in self.loading)

    @property
    def seconds(self) -> float:
        """Until the last rank was ready."""
        return max(report.seconds for report in self.loading)


def make_plan(session: Session, *, adapt: bool) -> Plan:
    """Builds the model on meta and checks the checkpoint against it.

    Args:
        adapt: a new adapter is trained; else only one that exists is put in place.

    Raises:
        UserError: any fault of model, checkpoint, patterns or adapter.
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
    start = load_start(config.adapter.init_from or source.adapter)
    lora = with_packed_linears(start.adapter.config) if start else None
    if adapt:
        lora = lora_config(config.adapter, model)
        check_start(start, lora)
    _warn_of_length(config, hf_config)
    if lora is not None:
        # low_cpu_mem_usage: the adapters are made on meta, too
        model = get_peft_model(base_model(model), lora, low_cpu_mem_usage=True)
        cast_adapters(model, DTYPES[config.adapter.dtype])
    else:
        model.requires_grad_(False)
    if session.strategy in FLAT and config.task in ("finetune", "eval"):  # which mount it
        check_flat(model, session.storage, session.strategy)
    return Plan(source, hf_config, reader, model, lora, start)


def build(plan: Plan, session: Session, *, packed: Path | None = None,
          on_layer: Callable[[str], object] = lambda _: None) -> Built:  # fmt: skip
    """Shards, materialises and fills the plan's model, to be saved and mounted. Collective.

    Args:
        packed: a folder like `quantized/` that holds what quantizing would make.

    Raises:
        UserError: NaN or Inf in a weight; packed weights or an adapter that do not belong.
    """
    model, processes = plan.model, session.processes
    check_bits(session.storage, session.strategy, processes)
    _cut(model, session)
    source, reader = plan.source, plan.reader
    if packed:
        source = replace(source, path=packed, kind="quantized")
        reader = open_weights(source, model, session.device)
    fingerprint, is_packed = Fingerprint(), source.kind == "quantized"
    filled = fill_model(
        model, reader, processes,
        quantized=is_packed, offload=session.offloads_parameters,
        on_rows=fingerprint.update, on_layer=on_layer,
    )  # fmt: skip
    settings = _fingerprinted(model, source, fingerprint, processes)
    if plan.lora is not None:
        fill_adapters(model, plan.start, settings.fingerprint, session.config)
    errors, total = ({}, None) if is_packed else filled.relative_errors(processes)
    return Built(model, settings, errors, total, processes.gather(filled.report))


def mount(model: nn.Module, session: Session) -> nn.Module:
    """Of a filled model, one that can be called; the same under most strategies. Collective.

    `fsdp1` and `zero3` have it from then on: its parameters cannot be gathered any more, but for
    those of adapters.
    """
    if session.strategy == "zero3":
        partition(model, session.storage, session.device)
    elif session.strategy == "fsdp1":
        base = base_model(model)
        name = next(name for name, module in model.named_modules() if module is base)
        wrapped = wrap_layers(base, session.storage, session.device)
        if not name:
            return wrapped
        model.set_submodule(name, wrapped)
    return model


def build_reference(plan: Plan, session: Session) -> tuple[nn.Module, int]:
    """The full-precision model, spread as the trained one is, and the bytes read. Collective."""
    model = build_meta(plan.hf_config, session.dtype).requires_grad_(False)
    _cut(model, session)
    reader = open_weights(plan.source, model, session.device)
    fill_model(model, reader, session.processes, offload=session.offloads_parameters)
    return mount(model, session).eval(), int(session.processes.sum([reader.bytes_read])[0])


def _cut(model: nn.Module, session: Session) -> None:
    if session.strategy == "fsdp2":
        shard(
            model, session.device, session.processes.size, session.replicas,
            session.offloads_parameters,
        )  # fmt: skip
    elif session.strategy in FLAT:
        spread(model, session.device, session.processes.size)


def _replace_linears(model: nn.Module, source: Source, session: Session) -> None:
    """As the checkpoint was quantized, or as the configuration wants it."""
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
                "quantizing %d linears, %.1f %% of the weights; %d stay in full precision",
                len(report.matched), 100 * report.share, len(report.skipped),
            )  # fmt: skip


def _fingerprinted(
    model: nn.Module, source: Source, fingerprint: Fingerprint, processes: Processes
) -> QuantizedSettings:
    total = Fingerprint()
    for part in processes.gather(fingerprint.total):
        total.merge(part)
    settings = QuantizedSettings.of(model)
    settings = replace(settings, fingerprint=total.hexdigest(settings.by_module()))
    if source.kind == "quantized":
        written = quantized_settings(source.path).fingerprint
        if settings.fingerprint != written:
            raise UserError(
                f"{source.path}: its packed weights are {settings.fingerprint}, but "
                f"config.json was written for {written}: a file was altered, or another version of "
                "hqqtrain wrote it. Quantize again."
            )
    return settings


def _warn_of_length(config: RunConfig, hf_config: PretrainedConfig) -> None:
    longest = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if longest and config.train.max_seq_len > longest:
        logger.warning(
            "train.max_seq_len=%d: the model was made for %d tokens at most",
            config.train.max_seq_len, longest,
        )  # fmt: skip
