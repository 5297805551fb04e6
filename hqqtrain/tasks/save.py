"""Save a sharded model: gather it tensor by tensor, and write the files on all ranks.

Every rank iterates over the same stream of tensors, because every gather is a collective.
"""

from hqqtrain.distributed.local import full_tensor
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.formats.adapter_card import AdapterCard
from hqqtrain.formats.peft import save_adapter
from hqqtrain.formats.registry import ModelExport
from hqqtrain.loading.build import LoadedModel, RunnableModel
from hqqtrain.models.fqn import is_adapter, peft_key
from hqqtrain.tasks.context import Run


def model_export(loaded: LoadedModel, runtime: Runtime) -> ModelExport:
    """Return the loaded model as the writers of `FORMATS` take it."""
    plan = loaded.plan
    return ModelExport(
        model=loaded.model,
        settings=loaded.settings,
        hf_config=plan.hf_config,
        tokenizer=plan.source.tokenizer,
        source_dtype=plan.source_dtype,
        adapter=plan.start.adapter if plan.start else None,
        dtype=runtime.dtype,
        device=runtime.device,
        comm=runtime.comm,
    )


def save_trained_adapter(run: Run, runnable: RunnableModel) -> None:
    """Write `adapter/` in PEFT's own format, with full tensors. Collective."""
    plan, recorder = runnable.plan, run.recorder
    state = {}
    for name, param in runnable.model.named_parameters():
        if is_adapter(name):
            state[peft_key(name)] = full_tensor(param).cpu()
    lora, folder = plan.lora, run.layout.adapter
    assert lora is not None
    facts = recorder.summary.parts["quantize"]
    keys = ("fingerprint", "nbits", "group_size", "axis", "solver", "bits_per_weight")
    card = AdapterCard(
        base=plan.source.name,
        revision=run.config.model.revision,
        figures=recorder.figures(),
        **{key: facts[key] for key in keys},
    )
    run.runtime.comm.run_on_rank0(lambda: save_adapter(state, lora, folder, card=card))
