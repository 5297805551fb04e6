"""From a plan to a model that is ready.

`build_model` shards, reads and quantizes; it is the same path for one process and for many. What it
leaves can be saved; `wrap_for_execution` makes it a model that runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.bit_exactness import check_bit_exactness
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.base import FLAT_STRATEGIES
from hqqtrain.distributed.strategies.fsdp1 import apply_fsdp1
from hqqtrain.distributed.strategies.fsdp2 import apply_fsdp2
from hqqtrain.distributed.strategies.row_sharding import shard_rows
from hqqtrain.distributed.strategies.zero3 import apply_zero3
from hqqtrain.formats.fingerprint import Fingerprint
from hqqtrain.formats.packed import QuantizedSettings, quantized_settings
from hqqtrain.loading.initial_adapter import initialize_adapters
from hqqtrain.loading.load import load_model
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.loading.stats import LoadStats
from hqqtrain.models.build import build_meta
from hqqtrain.models.fqn import base_model
from hqqtrain.models.source import ModelSource
from hqqtrain.models.weights.synthetic import open_weight_source


@dataclass
class LoadedModel:
    """The model, filled, and what filling it showed; the same on every rank."""

    model: nn.Module
    settings: QuantizedSettings
    layer_errors: dict[str, float]
    """Relative error by layer; empty where the weights came packed."""
    relative_error: float | None
    loading: list[LoadStats]
    """Of every rank."""

    @property
    def bytes_read(self) -> int:
        return sum(report.bytes_read for report in self.loading)

    @property
    def seconds(self) -> float:
        """Until the last rank was ready."""
        return max(report.seconds for report in self.loading)


def build_model(plan: ModelPlan, runtime: Runtime, *, packed: Path | None = None,
          on_layer: Callable[[str], object] = lambda _: None) -> LoadedModel:  # fmt: skip
    """Shards, materialises and fills the plan's model, to be saved and mounted. Collective.

    Args:
        packed: a folder like `quantized/` that holds what quantizing would make.

    Raises:
        UserError: NaN or Inf in a weight; packed weights or an adapter that do not belong.
    """
    model, comm = plan.model, runtime.comm
    check_bit_exactness(runtime.storage, runtime.strategy, comm)
    _cut(model, runtime)
    source, reader = plan.source, plan.reader
    if packed:
        source = replace(source, path=packed, kind="quantized")
        reader = open_weight_source(source, model, runtime.device)
    fingerprint, is_packed = Fingerprint(), source.kind == "quantized"
    filled = load_model(
        model, reader, comm,
        quantized=is_packed, offload=runtime.offloads_parameters,
        on_packed_rows=fingerprint.update, on_layer=on_layer,
    )  # fmt: skip
    settings = _fingerprinted(model, source, fingerprint, comm)
    if plan.lora is not None:
        initialize_adapters(model, plan.start, settings.fingerprint, runtime.config)
    errors, total = ({}, None) if is_packed else filled.relative_errors(comm)
    return LoadedModel(model, settings, errors, total, comm.gather(filled.report))


def wrap_for_execution(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Of a filled model, one that can be called; the same under most strategies. Collective.

    `fsdp1` and `zero3` have it from then on: its parameters cannot be gathered any more, but for
    those of adapters.
    """
    if runtime.strategy == "zero3":
        apply_zero3(model, runtime.storage, runtime.device)
    elif runtime.strategy == "fsdp1":
        base = base_model(model)
        name = next(name for name, module in model.named_modules() if module is base)
        wrapped = apply_fsdp1(base, runtime.storage, runtime.device)
        if not name:
            return wrapped
        model.set_submodule(name, wrapped)
    return model


def build_reference(plan: ModelPlan, runtime: Runtime) -> tuple[nn.Module, int]:
    """The full-precision model, spread as the trained one is, and the bytes read. Collective."""
    model = build_meta(plan.hf_config, runtime.dtype).requires_grad_(False)
    _cut(model, runtime)
    reader = open_weight_source(plan.source, model, runtime.device)
    load_model(
        model, reader, runtime.comm, offload=runtime.offloads_parameters,
        on_layer=lambda _: runtime.preemption.check_local(),
    )  # fmt: skip
    return wrap_for_execution(model, runtime).eval(), int(runtime.comm.sum([reader.bytes_read])[0])


def _cut(model: nn.Module, runtime: Runtime) -> None:
    if runtime.strategy == "fsdp2":
        apply_fsdp2(
            model, runtime.device, runtime.comm.size, runtime.replicas,
            runtime.offloads_parameters,
        )  # fmt: skip
    elif runtime.strategy in FLAT_STRATEGIES:
        shard_rows(model, runtime.device, runtime.comm.size)


def _fingerprinted(
    model: nn.Module, source: ModelSource, fingerprint: Fingerprint, comm: Communicator
) -> QuantizedSettings:
    total = Fingerprint()
    for part in comm.gather(fingerprint.total):
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
