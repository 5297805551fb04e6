"""The task `finetune`: quantize the model, train adapters on it, evaluate and save."""

import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from torch import nn

from hqqtrain.checkpoint.format import Checkpoint
from hqqtrain.checkpoint.manager import CheckpointContents, CheckpointManager, Stateful
from hqqtrain.checkpoint.resume import (
    check_resumable,
    check_step_count,
    dataset_digests,
    find_checkpoint,
)
from hqqtrain.common.secrets import mask_secrets
from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.loader import DataLoader, PackedLoader
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.distributed.local import full_tensor
from hqqtrain.formats.adapter_base import BaseModelRef
from hqqtrain.formats.adapter_card import AdapterCard
from hqqtrain.formats.peft import save_adapter
from hqqtrain.loading.calibrated_load import Calibration
from hqqtrain.loading.model_builder import RunnableModel, wrap_for_execution
from hqqtrain.loading.plan import ModelPlan, plan_model
from hqqtrain.loading.source_digest import digest_source
from hqqtrain.models.causal_lm import vocabulary_size
from hqqtrain.rundir.identity import package_versions, result_settings
from hqqtrain.tasks.calibration import load_calibration, packed_weights_digest
from hqqtrain.tasks.card_figures import card_metrics, describe_protocol
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import (
    batch_layout,
    check_same_text,
    load_held_out_data,
    load_training_data,
)
from hqqtrain.tasks.evaluation import RecordedEvaluation
from hqqtrain.tasks.generation_config import trained_generation_config
from hqqtrain.tasks.harness import load_harness, run_harness
from hqqtrain.tasks.model import check_fits_run, load_or_quantize, plan_settings
from hqqtrain.tasks.streaming import stream_training_data
from hqqtrain.tasks.training import AdapterTraining, build_run_trainer, evaluate_trained
from hqqtrain.training.best_evaluation import BestEvaluation


def finetune(run: Run) -> None:
    """Quantize the model, train adapters, evaluate and save; or resume from a checkpoint."""
    config, runtime, recorder = run.config, run.runtime, run.recorder
    comm, history = runtime.comm, recorder.history
    checkpoint = None if history.starts_over else _find_checkpoint(run)
    with comm.raise_on_all_ranks():
        if config.train.max_steps is not None:  # known before the text is read and tokenized
            check_step_count(checkpoint, config.train.max_steps)
        resumed = checkpoint.folder if checkpoint else None
        plan = plan_model(plan_settings(config), runtime, resumed=resumed)
    layout, harness = batch_layout(config, plan, comm), load_harness(run)
    source_digest = digest_source(plan.source, comm, runtime.preemption)
    history.check_checkpoint(checkpoint, source_digest)
    loader, held_out, digests, calibration = load_texts(run, plan, layout, checkpoint)
    has_quantized = history.has_quantized(packed_weights_digest(source_digest, calibration))
    with closing(loader):
        with comm.raise_on_all_ranks():
            check_resumable(checkpoint, digests, loader.total_steps)
            check_fits_run(run, plan, has_quantized=has_quantized, has_checkpoints=bool(checkpoint))
        # All checks have passed, so `run.resume=never` may delete the old results.
        history.delete_results()
        loaded = load_or_quantize(
            run, plan, checkpoint, source_digest=source_digest, calibration=calibration
        )
        runnable = wrap_for_execution(loaded, runtime.strategy)
        evaluation = RecordedEvaluation(run, runnable, held_out, layout, source_digest)
        if not recorder.has_evaluated(evaluation.base_key):
            evaluation.evaluate_as(evaluation.base_key, adapted=False)
            run_harness(run, runnable, harness, evaluation.base_key, adapted=False)
        best = BestEvaluation()
        parts: dict[str, Stateful] = {"record": recorder, "best_evaluation": best}
        if config.data.streaming:  # otherwise the index of the batch is enough
            parts["loader"] = loader
        contents = checkpoint_contents(run, runnable, digests, source_digest, parts)
        with (
            build_run_trainer(run, runnable.model, loader) as trainer,
            CheckpointManager(
                trainer, contents, recorder.checkpoints, config.ckpt, comm, runtime.preemption
            ) as checkpoints,
        ):
            AdapterTraining(run, runnable.model, trainer, evaluation, checkpoints, best).train(
                checkpoint
            )
    recorder.record_training(trainer.state, list(trainer.trainable_parameters.values()))
    patience = config.train.early_stopping_patience
    stopped_early = best.stall_reason(patience) if trainer.stopped_early else None
    adapter_step = evaluate_trained(run, evaluation, trainer, best)
    run_harness(run, runnable, harness, "final", adapted=True)
    recorder.record_best(best, adapter_step=adapter_step, stopped_early=stopped_early)
    save_trained_adapter(run, runnable, loader, trainer.trainable_parameters, adapter_step)
    evaluation.record_samples()


def load_texts(
    run: Run, plan: ModelPlan, layout: BatchLayout, checkpoint: Checkpoint | None
) -> tuple[DataLoader, TokenSequences | None, dict[str, str], Calibration | None]:
    """Load the training data, the held-out text and the calibration text of a run. Collective.

    Returns:
        The loader, the held-out set, a digest of each by its key, and the calibration text.

    Raises:
        UserError: A text cannot be read, or is not the same on all ranks.
    """
    tokenizer, vocab_size = plan.source.tokenizer, vocabulary_size(plan.model)
    if run.config.data.streaming:
        loader, held_out, digests = stream_training_data(
            run, tokenizer, vocab_size, layout, checkpoint
        )
        return loader, held_out, digests, load_calibration(run, plan, held_out)
    training = load_training_data(run, tokenizer, vocab_size)
    packed, held_out, digests = load_tokens(run, training.sequences, tokenizer, vocab_size, layout)
    return packed, held_out, digests, load_calibration(run, plan, held_out, training)


def _find_checkpoint(run: Run) -> Checkpoint | None:
    """Return the checkpoint that the run resumes from, if any. Collective."""
    recorder = run.recorder
    return find_checkpoint(
        recorder.checkpoints,
        run.runtime.comm,
        must_exist=run.config.run.resume == "must",
        has_finished_run=recorder.history.has_finished_run,
    )


def load_tokens(
    run: Run,
    training_data: TokenSequences,
    tokenizer_folder: Path,
    vocab_size: int,
    layout: BatchLayout,
) -> tuple[PackedLoader, TokenSequences | None, dict[str, str]]:
    """Load the held-out text of a run, and the loader of its training data. Collective.

    Args:
        run: The run.
        training_data: The sequences to train on.
        tokenizer_folder: The folder of the model's tokenizer.
        vocab_size: Number of token ids that the model knows.
        layout: Which texts may share a row, and a batch.

    Returns:
        The loader, the held-out set, and a digest of each by its key.

    Raises:
        UserError: The data cannot be read, or is not the same on all ranks.
    """
    config, comm = run.config, run.runtime.comm
    held_out = load_held_out_data(run, tokenizer_folder, vocab_size)
    with comm.raise_on_all_ranks():
        loader = PackedLoader(
            training_data,
            config.train,
            rank=comm.rank,
            world_size=comm.size,
            device=comm.device,
            layout=layout,
        )
        digests = dataset_digests(training_data, held_out)
    check_same_text(run, training_data, held_out)
    return loader, held_out, digests


def checkpoint_contents(
    run: Run,
    runnable: RunnableModel,
    digests: Mapping[str, str],
    source_digest: str,
    parts: Mapping[str, Stateful],
) -> CheckpointContents:
    """Return what a checkpoint of `run` contains in addition to the state of the trainer.

    Args:
        run: The run.
        runnable: The model that is trained.
        digests: The digests of the run's datasets, from `dataset_digests`.
        source_digest: The digest of the model's files.
        parts: The parts whose state a checkpoint contains, too, by their key.
    """
    plan, runtime = runnable.plan, run.runtime
    assert plan.lora is not None
    provenance = {
        "config": result_settings(run.config),
        "model": source_digest,
        "texts": digests,
        "strategy": runtime.strategy.name,
        "world_size": runtime.comm.size,
        "versions": package_versions(),
    }
    return CheckpointContents(plan.lora, adapter_base(run, runnable), parts, provenance)


def save_trained_adapter(
    run: Run,
    runnable: RunnableModel,
    loader: DataLoader,
    trainable_parameters: Mapping[str, nn.Parameter],
    step: int,
) -> None:
    """Write `adapter/` in PEFT's own format, with full tensors. Collective.

    Args:
        run: The run whose directory gets the adapter.
        runnable: The trained model.
        loader: The loader of the data on which it was trained.
        trainable_parameters: Its adapter, by PEFT's names.
        step: The optimizer step after which the adapter has these values.
    """
    plan, recorder = runnable.plan, run.recorder
    # All ranks gather the tensors in the same order: each `full_tensor` is a collective.
    state = {name: full_tensor(param).cpu() for name, param in trainable_parameters.items()}
    lora, folder = plan.lora, run.layout.adapter
    tokenizer = plan.source.tokenizer_folder
    assert lora is not None
    quantization = recorder.summary.content.quantize
    keys = (
        "fingerprint", "nbits", "group_size", "axis", "solver", "calibration",
        "calibration_tokens", "bits_per_weight",
    )  # fmt: skip
    card = AdapterCard(
        base=_source_name(plan),
        revision=run.config.model.revision,
        metrics=card_metrics(recorder.summary.content),
        measured_by=describe_protocol(recorder.summary.content),
        best_step=step if run.config.ckpt.load_best else None,
        has_new_tokens=bool(lora.trainable_token_indices),
        has_tokenizer=tokenizer is not None,
        has_saved_base=run.config.quant.save or plan.is_packed,
        **{key: getattr(quantization, key) for key in keys},
    )
    run.runtime.comm.run_on_rank0(
        lambda: save_adapter(
            state,
            lora,
            folder,
            base=adapter_base(run, runnable),
            card=card,
            tokenizer=plan.source.tokenizer_folder,
            generation_config=trained_generation_config(plan, loader),
        )
    )


def adapter_base(run: Run, runnable: RunnableModel) -> BaseModelRef:
    """Return the base that the adapter of a run names, for other tools.

    It is the run's `quantized/`, if the run saves one. A local folder is named by its full path,
    which works in every working directory.
    """
    plan, settings = runnable.plan, runnable.settings
    name, revision = _source_name(plan), run.config.model.revision
    if run.config.quant.save and settings.modules:
        name, revision = mask_secrets(os.path.abspath(run.layout.quantized), "commit"), None
    elif plan.source.kind != "synthetic" and os.path.isdir(os.path.expanduser(name)):
        name = os.path.abspath(plan.source.original or plan.source.path)
    return BaseModelRef(name, revision, settings.fingerprint, bool(settings.modules))


def _source_name(plan: ModelPlan) -> str:
    """Return the name of the source for the files of an adapter, without secrets.

    A commit in the name stays: other tools find the source by it.
    """
    return mask_secrets(plan.source.name, "commit")
