"""Saving what is spread over ranks: gathered tensor by tensor, written by all of them.

Every rank walks through the same stream, since every gather is a collective.
"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from hqqtrain.distributed.local import full_tensor
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.formats.adapter_card import AdapterCard
from hqqtrain.formats.dense import dense_tensors, export_dense
from hqqtrain.formats.packed import model_tensors
from hqqtrain.formats.peft import save_adapter
from hqqtrain.loading.build import LoadedModel
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.models.fqn import is_adapter, peft_key
from hqqtrain.tasks.recorder import RunRecorder

Tensors = Iterator[tuple[str, Tensor]]


def save_dense(plan: ModelPlan, loaded: LoadedModel, runtime: Runtime, folder: Path) -> None:
    """Writes dense weights with the adapter merged in, every rank its part. Collective."""
    packed = model_tensors(loaded.model, gather=full_tensor)
    start = plan.start.adapter if plan.start else None
    dense = dense_tensors(
        packed, loaded.settings, start, dtype=runtime.dtype, device=runtime.device
    )
    export_dense(
        dense, folder, hf_config=plan.hf_config, source=plan.source.tokenizer,
        dtype=runtime.dtype, comm=runtime.comm,
    )  # fmt: skip


def save_trained_adapter(
    plan: ModelPlan, loaded: LoadedModel, runtime: Runtime, recorder: RunRecorder
) -> None:
    """Writes `adapter/`, stock PEFT with full tensors. Collective."""
    state = {}
    for name, param in loaded.model.named_parameters():
        if is_adapter(name):
            state[peft_key(name)] = full_tensor(param).cpu()
    lora, folder = plan.lora, recorder.path("adapter")
    assert lora is not None
    runtime.comm.run_on_rank0(lambda: save_adapter(state, lora, folder, card=_card(plan, recorder)))


def _card(plan: ModelPlan, recorder: RunRecorder) -> AdapterCard:
    made = recorder.summary.parts["quantize"]
    keys = ("fingerprint", "nbits", "group_size", "axis", "solver", "bits_per_weight")
    return AdapterCard(
        base=plan.source.name, revision=recorder.config.model.revision, figures=recorder.figures(),
        **{key: made[key] for key in keys},
    )  # fmt: skip
