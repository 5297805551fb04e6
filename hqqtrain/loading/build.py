"""Turn a plan into a loaded model, and a loaded model into one that runs.

`build_model` shards, reads and quantizes, on the same path for one process and for many. Its result can
be saved; `wrap_for_execution` wraps it for execution.
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
    """The loaded model and the results of loading it; the same on every rank."""

    model: nn.Module
    settings: QuantizedSettings
    layer_errors: dict[str, float]
    """Relative quantization error by layer; empty if the weights were packed already."""
    relative_error: float | None
    """Relative error over all layers; None if the weights were packed already."""
    loading: list[LoadStats]
    """Loading statistics by rank."""

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that all ranks together have read."""
        return sum(report.bytes_read for report in self.loading)

    @property
    def seconds(self) -> float:
        """Loading time of the slowest rank."""
        return max(report.seconds for report in self.loading)


def build_model(
    plan: ModelPlan,
    runtime: Runtime,
    *,
    packed: Path | None = None,
    on_layer: Callable[[str], object] = lambda _: None,
) -> LoadedModel:
    """Shard, materialize and load the model of the plan. Collective.

    Args:
        plan: The plan; its `model` becomes the loaded one.
        session: Processes, dtypes and strategy of the run.
        packed: A folder like `quantized/` with the result of an earlier quantization of the same
            plan. It is read in place of the dense weights.
        on_layer: Called with the name of each layer that is finished.

    Raises:
        UserError: A weight has NaN or Inf, the packed weights were altered, or the adapter belongs
            to another base.
    """
    model, comm = plan.model, runtime.comm
    check_bit_exactness(runtime.storage, runtime.strategy, comm)
    # Shard while the model is on meta, so that no rank ever allocates the whole of it.
    _shard(model, runtime)
    source, reader = plan.source, plan.reader
    if packed:
        source = replace(source, path=packed, kind="quantized")
        reader = open_weight_source(source, model, runtime.device)
    # Each rank hashes the packed rows that it makes or reads; `_add_fingerprint` sums them up.
    fingerprint, is_packed = Fingerprint(), source.kind == "quantized"
    filled = load_model(
        model,
        reader,
        comm,
        quantized=is_packed,
        offload=runtime.offloads_parameters,
        on_packed_rows=fingerprint.update,
        on_layer=on_layer,
    )
    settings = _add_fingerprint(model, source, fingerprint, comm)
    if plan.lora is not None:
        initialize_adapters(model, plan.start, settings.fingerprint, runtime.config)
    errors, total = ({}, None) if is_packed else filled.relative_errors(comm)
    return LoadedModel(model, settings, errors, total, comm.gather(filled.report))


def wrap_for_execution(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Wrap a loaded model for execution. Collective.

    FSDP1 and ZeRO-3 take ownership of the parameters: afterwards only those of the adapters can be
    gathered. The other strategies return `model` itself.
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
    """Return the full-precision model, sharded like the trained one, and the bytes read.

    The bytes are the sum over all ranks. Collective.
    """
    model = build_meta(plan.hf_config, runtime.dtype).requires_grad_(False)
    _shard(model, runtime)
    reader = open_weight_source(plan.source, model, runtime.device)
    load_model(
        model,
        reader,
        runtime.comm,
        offload=runtime.offloads_parameters,
        on_layer=lambda _: runtime.preemption.check_local(),
    )
    return wrap_for_execution(model, runtime).eval(), int(runtime.comm.sum([reader.bytes_read])[0])


def _shard(model: nn.Module, runtime: Runtime) -> None:
    """Shard a model on meta; DDP and a single process leave it whole.

    FSDP1 and ZeRO-3 shard flat memory and need full tensors first. Their models are sharded by
    rows for loading (`shard_rows`), and `wrap_for_execution` hands them over.
    """
    if runtime.strategy == "fsdp2":
        apply_fsdp2(
            model,
            runtime.device,
            runtime.comm.size,
            runtime.replicas,
            runtime.offloads_parameters,
        )
    elif runtime.strategy in FLAT_STRATEGIES:
        shard_rows(model, runtime.device, runtime.comm.size)


def _add_fingerprint(
    model: nn.Module, source: ModelSource, fingerprint: Fingerprint, comm: Communicator
) -> QuantizedSettings:
    """Return the quantization settings of the model with the fingerprint over all ranks.

    Raises:
        UserError: Packed weights do not have the fingerprint in their config.json.
    """
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
                f"config.json was written for {written}: a file was altered, or written by another "
                "version of hqqtrain. Quantize again."
            )
    return settings
