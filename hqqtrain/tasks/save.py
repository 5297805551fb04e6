"""Saving what is spread over ranks: gathered tensor by tensor, written by all of them.

Every rank walks through the same stream, since every gather is a collective.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from hqqtrain.ckpt import (
    AdapterCard,
    dense_tensors,
    export_dense,
    model_tensors,
    save_adapter,
    save_quantized,
)  # fmt: skip
from hqqtrain.dist import full_tensor
from hqqtrain.models import adapter_name, is_adapter
from hqqtrain.tasks.plan import Plan
from hqqtrain.tasks.prepare import Built
from hqqtrain.tasks.record import Record
from hqqtrain.train.session import Session

Tensors = Iterator[tuple[str, Tensor]]


def save_packed(
    plan: Plan, built: Built, session: Session, folder: Path,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Writes `quantized/`, every rank its part, and `beside` it JSON files. Collective."""
    tensors = _as_read(model_tensors(built.model, gather=full_tensor), plan)
    save_quantized(
        tensors, folder, hf_config=plan.hf_config, settings=built.settings,
        source=plan.source.tokenizer, processes=session.processes, beside=beside,
    )  # fmt: skip


def save_dense(plan: Plan, built: Built, session: Session, folder: Path) -> None:
    """Writes dense weights with the adapter merged in, every rank its part. Collective."""
    packed = model_tensors(built.model, gather=full_tensor)
    start = plan.start.adapter if plan.start else None
    dense = dense_tensors(packed, built.settings, start, dtype=session.dtype, device=session.device)
    export_dense(
        dense, folder, hf_config=plan.hf_config, source=plan.source.tokenizer,
        dtype=session.dtype, processes=session.processes,
    )  # fmt: skip


def save_adapter_of(plan: Plan, built: Built, session: Session, record: Record) -> None:
    """Writes `adapter/`, stock PEFT with full tensors. Collective."""
    state = {}
    for name, param in built.model.named_parameters():
        if is_adapter(name):
            state[adapter_name(name)] = full_tensor(param).cpu()
    lora, folder = plan.lora, record.path("adapter")
    assert lora is not None
    session.processes.on_main(lambda: save_adapter(state, lora, folder, card=_card(plan, record)))


def _as_read(tensors: Tensors, plan: Plan) -> Tensors:
    """Tensors in full precision in the dtype they were read in, whatever was computed in."""
    for name, tensor in tensors:
        same = tensor.is_floating_point() and name in plan.reader
        yield name, tensor.to(plan.reader.dtype(name)) if same else tensor


def _card(plan: Plan, record: Record) -> AdapterCard:
    made = record.summary.parts["quantize"]
    keys = ("fingerprint", "nbits", "group_size", "axis", "solver", "bits_per_weight")
    return AdapterCard(
        base=plan.source.name, revision=record.config.model.revision, figures=record.figures(),
        **{key: made[key] for key in keys},
    )  # fmt: skip
