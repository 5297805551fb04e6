"""From a plan to a model that is ready.

`build` shards, reads and quantizes; it is the same path for one process and for many. What it
leaves can be saved; `mount` makes it a model that runs.
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
    fill_model(
        model, reader, session.processes, offload=session.offloads_parameters,
        on_layer=lambda _: session.interrupt.check_alone(),
    )  # fmt: skip
    return mount(model, session).eval(), int(session.processes.sum([reader.bytes_read])[0])


def _cut(model: nn.Module, session: Session) -> None:
    if session.strategy == "fsdp2":
        shard(
            model, session.device, session.processes.size, session.replicas,
            session.offloads_parameters,
        )  # fmt: skip
    elif session.strategy in FLAT:
        spread(model, session.device, session.processes.size)


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
