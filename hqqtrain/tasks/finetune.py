"""The task `finetune`: connects the trainer with checkpoints, evaluation and the recorder."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hqqtrain.checkpoint.format import Checkpoint
from hqqtrain.checkpoint.manager import CheckpointContents, CheckpointManager
from hqqtrain.checkpoint.resume import check_resumable, dataset_digests, find_checkpoint
from hqqtrain.common.errors import PreemptedError
from hqqtrain.data.loader import DataLoader, PackedLoader
from hqqtrain.distributed.consistency import ConsistencyChecker
from hqqtrain.formats.peft import BaseModelRef
from hqqtrain.loading.build import RunnableModel, wrap_for_execution
from hqqtrain.loading.plan import plan_model
from hqqtrain.rundir.identity import package_versions
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import check_same_text, load_held_out_data, load_training_data
from hqqtrain.tasks.evaluation import RecordedEvaluation
from hqqtrain.tasks.model import check_fits_run, load_or_quantize, plan_settings
from hqqtrain.tasks.save import save_trained_adapter
from hqqtrain.train.activation_checkpointing import apply_activation_checkpointing
from hqqtrain.train.build import build_engine
from hqqtrain.train.losses.model_loss import ModelLoss
from hqqtrain.train.losses.registry import LOSSES
from hqqtrain.train.metrics import step_metrics
from hqqtrain.train.mfu import mfu_per_token_rate
from hqqtrain.train.nonfinite import NonFiniteGuard
from hqqtrain.train.schedule import LearningRateSchedule
from hqqtrain.train.state import StepResult
from hqqtrain.train.trainables import trainable_parameters
from hqqtrain.train.trainer import Trainer


def finetune(run: Run) -> None:
    """Quantize the model, train adapters, evaluate and save; or resume that from a checkpoint."""
    config, runtime, recorder = run.config, run.runtime, run.recorder
    comm, history = runtime.comm, recorder.history
    found = None
    if not history.starts_over:
        must_exist = config.run.resume == "must"
        found = find_checkpoint(
            recorder.checkpoints, comm, must_exist=must_exist, was_finished=history.was_finished
        )
    has_quantized = history.has_quantized()
    with comm.raise_on_all_ranks():
        plan = plan_model(plan_settings(config), runtime, resumed=found.folder if found else None)
        training = load_training_data(run, plan.source.tokenizer)
        held_out = load_held_out_data(config, plan.source.tokenizer)
        loader = PackedLoader(
            training, config.train, rank=comm.rank, world_size=comm.size, device=comm.device
        )
        digests = dataset_digests(training, held_out)
        check_resumable(found, digests, loader.total_steps)
        check_fits_run(
            run, plan.model, has_quantized=has_quantized, has_checkpoints=found is not None
        )
    check_same_text(run, training, held_out)
    history.forget()
    loaded = load_or_quantize(run, plan, found)
    runnable = wrap_for_execution(loaded, runtime.strategy)
    evaluation = RecordedEvaluation(run, runnable, held_out)
    if not recorder.has_evaluated("quantized"):
        evaluation.measure("quantized", adapted=False)
    trainer = train_adapters(run, runnable, loader, digests, evaluation, found)
    recorder.trained(trainer.state, list(trainer.trainable_parameters.values()))
    evaluation.measure("final", adapted=True)
    save_trained_adapter(run, runnable, trainer.trainable_parameters)


def train_adapters(
    run: Run,
    runnable: RunnableModel,
    loader: DataLoader,
    digests: Mapping[str, str],
    evaluation: RecordedEvaluation,
    found: Checkpoint | None = None,
) -> Trainer:
    """Train to the last step, from step 0 or from `found`, and return the trainer. Collective.

    Raises:
        PreemptedError: The run was asked to stop; a checkpoint has its state.
        UserError: A loss or gradient is not finite, and `train.on_nonfinite` says to stop, or has
            already skipped too many batches.
    """
    config, runtime, recorder = run.config, run.runtime, run.recorder
    plan, comm = runnable.plan, runtime.comm
    trainer = build_trainer(run, runnable.model, loader)
    per_token = mfu_per_token_rate(runnable.model, runtime.device_name, comm.size)
    base = BaseModelRef(plan.source.name, config.model.revision, runnable.settings.fingerprint)
    assert plan.lora is not None
    facts = {"texts": digests, "strategy": runtime.strategy.name, "world_size": comm.size}
    contents = CheckpointContents(
        plan.lora, base, {"record": recorder}, facts | {"versions": package_versions()}
    )
    with CheckpointManager(
        trainer, contents, recorder.checkpoints, config.ckpt, comm, runtime.preemption
    ) as checkpoints:
        checkpoints.resume(found)
        # A preempted process saves first and leaves out the evaluation; it is made up for here.
        missed = found is not None and found.state["eval_loss"] is None
        if missed and _is_evaluation_due(trainer, config.eval.every):
            loss = evaluation.measure_between()
            if loss is not None and config.ckpt.keep_best:
                checkpoints.save(loss)
        check_every = config.parallel.consistency_check_every
        checker = ConsistencyChecker(runnable.model, comm) if check_every else None
        with recorder.bars.training(loader.total_steps, trainer.state.steps):
            for step in trainer.run(checkpoints.roll_back):
                if checker and check_every and (step.number % check_every == 0 or trainer.is_over):
                    checker.check()
                epoch = loader.epoch(trainer.state.next_batch_index)
                metrics = step_metrics(step, epoch=epoch, mfu_per_token_rate=per_token)
                recorder.step(step.number, metrics)
                eval_loss, must_stop = _evaluate_if_due(trainer, evaluation, config.eval.every)
                checkpoints.after_step(eval_loss, stop_requested=must_stop)
        if checker and checker.checks:
            checker.report(trainer.state.seconds)
        checkpoints.wait()
        checkpoints.report()
    return trainer


def build_trainer(run: Run, model: nn.Module, loader: DataLoader) -> Trainer:
    """Build the trainer of the adapters in `model`, which can be called. Collective."""
    config, runtime, comm = run.config, run.runtime, run.runtime.comm
    train, strategy = config.train, runtime.strategy
    trainables = trainable_parameters(model)
    if train.activation_checkpointing:
        apply_activation_checkpointing(
            model, offload=runtime.offloads_activations, frees=strategy.frees_parameters
        )
    engine = build_engine(model, trainables, runtime, config.optim, train.max_grad_norm)
    loss = ModelLoss(
        engine.model, LOSSES[train.objective](), comm,
        max_tokens=train.micro_batch_size * train.max_seq_len,
        may_call_head_alone=strategy.may_call_head_alone, autocast=runtime.autocast,
    )  # fmt: skip

    def record(step: StepResult, facts: dict[str, Any]) -> None:
        run.recorder.nonfinite(step, facts | loader.describe(step.batch_index))

    guard = NonFiniteGuard(
        train.on_nonfinite, comm, record, autocast=runtime.autocast, lr=config.optim.lr,
        scales_gradients=runtime.accelerator.scaler is not None,
    )  # fmt: skip
    schedule = LearningRateSchedule(config.optim, loader.total_steps)
    return Trainer(
        engine, trainables, loader, loss, schedule, guard, comm, runtime.preemption, train.seed
    )


def _evaluate_if_due(
    trainer: Trainer, evaluation: RecordedEvaluation, every: int | None
) -> tuple[float | None, bool]:
    """Return the held-out loss after this step, or None if none is due, and whether to stop."""
    if not _is_evaluation_due(trainer, every):
        return None, trainer.stop_requested
    try:
        return evaluation.measure_between(), False
    except PreemptedError:  # raised on all ranks; the caller saves a checkpoint and then stops
        return None, True


def _is_evaluation_due(trainer: Trainer, every: int | None) -> bool:
    ends = trainer.is_over or trainer.stop_requested
    return every is not None and trainer.state.steps % every == 0 and not ends
