"""Train the adapters of a run: connect the trainer with checkpoints, evaluation and the recorder.

The trainer writes no file and logs no metric, so that it can be tested and reused by itself. This
module decides what happens before the first step and after each one.
"""

import logging
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from hqqtrain.checkpoint.format import Checkpoint
from hqqtrain.checkpoint.manager import CheckpointManager
from hqqtrain.checkpoint.resume import load_best
from hqqtrain.common.errors import DataError, PreemptedError
from hqqtrain.data.loader import DataLoader
from hqqtrain.distributed.consistency import ConsistencyChecker
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.evaluation import RecordedEvaluation
from hqqtrain.tasks.profiling import profile_steps
from hqqtrain.tasks.resources import workload_of
from hqqtrain.training.best_evaluation import BestEvaluation
from hqqtrain.training.metrics import mfu_per_token_rate, step_metrics
from hqqtrain.training.state import StepResult
from hqqtrain.training.trainer import Trainer
from hqqtrain.training.trainer_builder import build_trainer

logger = logging.getLogger(__name__)


def build_run_trainer(
    run: Run, model: nn.Module, loader: DataLoader
) -> AbstractContextManager[Trainer]:
    """Make the context of the trainer of a run; see `build_trainer`. Collective.

    Args:
        run: Settings of the training, and the recorder of steps that are refused.
        model: The model, which the strategy has wrapped.
        loader: The training data.
    """

    def record_refusal(step: StepResult, cause: dict[str, Any]) -> None:
        run.recorder.save_nonfinite_batch(step, cause | loader.describe(step.batch_index))

    return build_trainer(
        model, loader, run.runtime, run.config.train, run.config.optim, workload_of(run.config),
        record_refusal=record_refusal, advice="Its samples are in nonfinite/ of the run.",
        after_step=[profile_steps(run, loader.total_steps)],
    )  # fmt: skip


class AdapterTraining:
    """The training of a run's adapters, from its first step or from a checkpoint to its last.

    Args:
        run: Settings of the training, and the recorder.
        model: The model, as the strategy has wrapped it.
        trainer: Trains the adapters of `model`.
        evaluation: Measures the model between steps.
        checkpoints: Saves and restores the state of `trainer`.
        best: Gets the evaluations. `checkpoints` saves it, and this class restores it.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        trainer: Trainer,
        evaluation: RecordedEvaluation,
        checkpoints: CheckpointManager,
        best: BestEvaluation,
    ) -> None:
        self._run, self._model, self._trainer, self._best = run, model, trainer, best
        self._evaluation, self._checkpoints = evaluation, checkpoints
        self._mfu_per_token_rate = mfu_per_token_rate(
            model, run.runtime.device_name, run.runtime.comm.size
        )

    def train(self, checkpoint: Checkpoint | None = None) -> None:
        """Train to the last step or until it stops early, from step 0 or `checkpoint`. Collective.

        Raises:
            PreemptedError: The run was asked to stop; its state is saved in a checkpoint.
            UserError: A loss or gradient is not finite, and either `train.on_nonfinite=stop` or
                too many steps in a row were refused; or a checkpoint cannot be written or read.
        """
        trainer, checkpoints = self._trainer, self._checkpoints
        checkpoints.resume(checkpoint)
        self._restore_best(checkpoint)
        self._make_up_evaluation(checkpoint)
        every = self._run.config.parallel.consistency_check_every
        checker = ConsistencyChecker(self._model, self._run.runtime.comm) if every else None
        eval_loss = None
        with self._run.recorder.progress_bars.show_training(
            trainer.loader.total_steps, trainer.state.steps
        ):
            try:
                for step in trainer.run(lambda: self._restore_best(checkpoints.roll_back())):
                    self._log_step(step)
                    eval_loss, must_stop = self._evaluate_if_due()
                    if checker and every and (step.number % every == 0 or trainer.is_over):
                        checker.check()
                    checkpoints.after_step(eval_loss, stop_requested=must_stop)
            except (PreemptedError, DataError):  # before a step that lacks its data, on all ranks
                checkpoints.save_before_stop(eval_loss)
                raise
        if checker and checker.checks:
            checker.report(trainer.state.seconds)
        checkpoints.wait_for_write()
        checkpoints.log_waiting_time()

    def _make_up_evaluation(self, checkpoint: Checkpoint | None) -> None:
        """Evaluate now if an evaluation was due at `checkpoint`, but was skipped or interrupted."""
        if checkpoint is None or checkpoint.state["eval_loss"] is not None:
            return
        if not self._is_evaluation_due():
            return
        loss = self._evaluation.evaluate_during_training()
        if loss is None:
            return
        self._count_evaluation(loss)
        if self._run.config.ckpt.num_best:
            self._checkpoints.save(loss)

    def _restore_best(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint:
            self._best.load_state_dict(checkpoint.state.get("best_evaluation", {}))
            self._stop_if_stalled()

    def _count_evaluation(self, loss: float) -> None:
        self._best.add(self._trainer.state.steps, loss)
        self._stop_if_stalled()

    def _stop_if_stalled(self) -> None:
        """Stop the training if too many evaluations in a row have not lowered the loss."""
        reason = self._best.stall_reason(self._run.config.train.early_stopping_patience)
        # All ranks have measured the same loss; rank 0 decides, so that none can differ.
        reason = self._run.runtime.comm.run_on_rank0(lambda: reason)
        self._trainer.stopped_early = reason is not None
        if reason:
            logger.info(reason)

    def _log_step(self, step: StepResult) -> None:
        epoch = self._trainer.loader.epoch(self._trainer.state.next_batch_index)
        metrics = step_metrics(step, epoch=epoch, mfu_per_token_rate=self._mfu_per_token_rate)
        self._run.recorder.log_step(step.number, metrics)

    def _evaluate_if_due(self) -> tuple[float | None, bool]:
        """Evaluate if it is due; return the held-out loss, if any, and whether to stop."""
        if not self._is_evaluation_due():
            return None, self._trainer.stop_requested
        try:
            loss = self._evaluation.evaluate_during_training()
        except PreemptedError:  # raised on all ranks
            return None, True  # the caller saves a checkpoint, then stops
        if loss is not None:
            self._count_evaluation(loss)
        return loss, False

    def _is_evaluation_due(self) -> bool:
        every, trainer = self._run.config.eval.every, self._trainer
        # The task evaluates after the last step. A process that must stop has no time to evaluate.
        ends = trainer.is_over or trainer.stop_requested
        return every is not None and trainer.state.steps % every == 0 and not ends


def evaluate_trained(
    run: Run, evaluation: RecordedEvaluation, trainer: Trainer, best: BestEvaluation
) -> int:
    """Evaluate the trained model as `final`, and return the step of its adapter. Collective.

    With `ckpt.load_best`, the model gets the adapter of the best checkpoint, if that has a lower
    loss than the last step.

    Args:
        run: The run.
        evaluation: Measures the model.
        trainer: The trainer, after its last step.
        best: The evaluations during training; gets that of the last step, too.
    """
    last_step, store = trainer.state.steps, run.recorder.checkpoints
    loss = evaluation.evaluate_as("final", adapted=True)
    if loss is None:
        return last_step
    best.add(last_step, loss)
    if not run.config.ckpt.load_best:
        return last_step
    checkpoint = load_best(store, run.runtime.comm, below=loss)
    step = checkpoint.step if checkpoint else last_step
    if best.step not in (None, step):
        logger.warning("%s is not there any more; step %d is used", store.folder(best.step), step)
    if checkpoint:
        with run.runtime.comm.raise_on_all_ranks():
            parameters = checkpoint.parameters()
        trainer.load_parameters(parameters)
        logger.info("the adapter is that of %s, the best checkpoint", checkpoint.folder)
        evaluation.evaluate_as("final", adapted=True, log=False)
    return step
