"""Save a sharded model: gather it tensor by tensor, and write the files on all ranks.

Every rank iterates over the same stream of tensors, because every gather is a collective.
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
    plan: Plan,
    built: Built,
    session: Session,
    folder: Path,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the packed weights to `folder`; every rank writes a part of the files. Collective.

    Args:
        plan: The plan of the model.
        built: The loaded model.
        session: Processes of the run.
        folder: A folder like `quantized/`, which appears complete or not at all.
        beside: Further JSON files, name to content.
    """
    tensors = _in_source_dtype(model_tensors(built.model, gather=full_tensor), plan)
    save_quantized(
        tensors,
        folder,
        hf_config=plan.hf_config,
        settings=built.settings,
        source=plan.source.tokenizer,
        processes=session.processes,
        beside=beside,
    )


def save_dense(plan: Plan, built: Built, session: Session, folder: Path) -> None:
    """Write dense weights with the adapter merged in; every rank writes a part. Collective."""
    packed = model_tensors(built.model, gather=full_tensor)
    adapter = plan.start.adapter if plan.start else None
    dense = dense_tensors(
        packed, built.settings, adapter, dtype=session.dtype, device=session.device
    )
    export_dense(
        dense,
        folder,
        hf_config=plan.hf_config,
        source=plan.source.tokenizer,
        dtype=session.dtype,
        processes=session.processes,
    )


def save_adapter_of(plan: Plan, built: Built, session: Session, record: Record) -> None:
    """Write `adapter/` in PEFT's own format, with full tensors. Collective."""
    state = {}
    for name, param in built.model.named_parameters():
        if is_adapter(name):
            state[adapter_name(name)] = full_tensor(param).cpu()
    lora, folder = plan.lora, record.path("adapter")
    assert lora is not None
    facts = record.summary.parts["quantize"]
    keys = ("fingerprint", "nbits", "group_size", "axis", "solver", "bits_per_weight")
    card = AdapterCard(
        base=plan.source.name,
        revision=record.config.model.revision,
        figures=record.figures(),
        **{key: facts[key] for key in keys},
    )
    session.processes.on_main(lambda: save_adapter(state, lora, folder, card=card))


def _in_source_dtype(tensors: Tensors, plan: Plan) -> Tensors:
    """Cast full-precision tensors back to the dtype of the source, whatever the run computes in."""
    for name, tensor in tensors:
        is_of_source = tensor.is_floating_point() and name in plan.reader
        yield name, tensor.to(plan.reader.dtype(name)) if is_of_source else tensor
