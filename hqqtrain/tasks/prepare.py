"""Turn a plan into a loaded model, and a loaded model into one that runs.

`build` shards, reads and quantizes, on the same path for one process and for many. Its result can
be saved; `mount` wraps it for execution.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from hqqtrain.ckpt import Fingerprint, QuantizedSettings, quantized_settings
from hqqtrain.config import UserError
from hqqtrain.dist import (
    FLAT,
    LoadReport,
    Processes,
    check_bits,
    partition,
    shard,
    spread,
    wrap_layers,
)  # fmt: skip
from hqqtrain.models import Source, base_model, build_meta, open_weights
from hqqtrain.tasks.adapters import fill_adapters
from hqqtrain.tasks.filling import fill_model
from hqqtrain.tasks.plan import Plan
from hqqtrain.train.session import Session


@dataclass
class Built:
    """The loaded model and the results of loading it; the same on every rank."""

    model: nn.Module
    settings: QuantizedSettings
    layer_errors: dict[str, float]
    """Relative quantization error by layer; empty if the weights were packed already."""
    relative_error: float | None
    """Relative error over all layers; None if the weights were packed already."""
    loading: list[LoadReport]
    """Loading statistics by rank."""

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that all ranks together have read."""
        return sum(report.bytes_read for report in self.loading)

    @property
    def seconds(self) -> float:
        """Loading time of the slowest rank."""
        return max(report.seconds for report in self.loading)


def build(
    plan: Plan,
    session: Session,
    *,
    packed: Path | None = None,
    on_layer: Callable[[str], object] = lambda _: None,
) -> Built:
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
    model, processes = plan.model, session.processes
    check_bits(session.storage, session.strategy, processes)
    # Shard while the model is on meta, so that no rank ever allocates the whole of it.
    _shard(model, session)
    source, reader = plan.source, plan.reader
    if packed:
        source = replace(source, path=packed, kind="quantized")
        reader = open_weights(source, model, session.device)
    # Each rank hashes the packed rows that it makes or reads; `_add_fingerprint` sums them up.
    fingerprint, is_packed = Fingerprint(), source.kind == "quantized"
    filled = fill_model(
        model,
        reader,
        processes,
        quantized=is_packed,
        offload=session.offloads_parameters,
        on_rows=fingerprint.update,
        on_layer=on_layer,
    )
    settings = _add_fingerprint(model, source, fingerprint, processes)
    if plan.lora is not None:
        fill_adapters(model, plan.start, settings.fingerprint, session.config)
    errors, total = ({}, None) if is_packed else filled.relative_errors(processes)
    return Built(model, settings, errors, total, processes.gather(filled.report))


def mount(model: nn.Module, session: Session) -> nn.Module:
    """Wrap a loaded model for execution. Collective.

    FSDP1 and ZeRO-3 take ownership of the parameters: afterwards only those of the adapters can be
    gathered. The other strategies return `model` itself.
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
    """Return the full-precision model, sharded like the trained one, and the bytes read.

    The bytes are the sum over all ranks. Collective.
    """
    model = build_meta(plan.hf_config, session.dtype).requires_grad_(False)
    _shard(model, session)
    reader = open_weights(plan.source, model, session.device)
    fill_model(
        model,
        reader,
        session.processes,
        offload=session.offloads_parameters,
        on_layer=lambda _: session.interrupt.check_alone(),
    )
    return mount(model, session).eval(), int(session.processes.sum([reader.bytes_read])[0])


def _shard(model: nn.Module, session: Session) -> None:
    """Shard a model on meta; DDP and a single process leave it whole.

    FSDP1 and ZeRO-3 shard flat memory and need full tensors first. Their models are sharded by
    rows for loading (`spread`), and `mount` hands them over.
    """
    if session.strategy == "fsdp2":
        shard(
            model,
            session.device,
            session.processes.size,
            session.replicas,
            session.offloads_parameters,
        )
    elif session.strategy in FLAT:
        spread(model, session.device, session.processes.size)


def _add_fingerprint(
    model: nn.Module, source: Source, fingerprint: Fingerprint, processes: Processes
) -> QuantizedSettings:
    """Return the quantization settings of the model with the fingerprint over all ranks.

    Raises:
        UserError: Packed weights do not have the fingerprint in their config.json.
    """
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
                f"config.json was written for {written}: a file was altered, or written by another "
                "version of hqqtrain. Quantize again."
            )
    return settings
