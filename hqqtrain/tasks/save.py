"""Save a sharded model: gather it tensor by tensor, and write the files on all ranks.

Every rank iterates over the same stream of tensors, because every gather is a collective.
"""

from collections.abc import Mapping

from torch import nn

from hqqtrain.distributed.local import full_tensor
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.formats.adapter_card import AdapterCard
from hqqtrain.formats.peft import save_adapter
from hqqtrain.formats.registry import ModelExport
from hqqtrain.loading.build import LoadedModel, RunnableModel
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


def save_trained_adapter(
    run: Run, runnable: RunnableModel, trainable_parameters: Mapping[str, nn.Parameter]
) -> None:
    """Write `adapter/` in PEFT's own format, with full tensors. Collective.

    Args:
        run: The run whose directory gets the adapter.
        runnable: The trained model.
        trainable_parameters: Its adapter, by PEFT's names.
    """
    plan, recorder = runnable.plan, run.recorder
    state = {name: full_tensor(param).cpu() for name, param in trainable_parameters.items()}
    lora, folder = plan.lora, run.layout.adapter
    assert lora is not None
    facts = recorder.summary.figures.quantize
    keys = ("fingerprint", "nbits", "group_size", "axis", "solver", "bits_per_weight")
    card = AdapterCard(
        base=plan.source.name,
        revision=run.config.model.revision,
        figures=recorder.figures(),
        **{key: getattr(facts, key) for key in keys},
    )
    run.runtime.comm.run_on_rank0(lambda: save_adapter(state, lora, folder, card=card))
