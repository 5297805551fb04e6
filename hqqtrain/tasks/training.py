"""Training of a task: connects the trainer with checkpoints, evaluation and the record."""

from hqqtrain.checkpoint.format import Checkpoint
from hqqtrain.checkpoint.manager import CheckpointManager
from hqqtrain.common.errors import PreemptedError
from hqqtrain.data.packing import TokenSequences
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.evaluation.evaluator import Evaluator
from hqqtrain.loading.build import LoadedModel
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.tasks.recorder import RunRecorder
from hqqtrain.train.nonfinite import NonFiniteGuard
from hqqtrain.train.trainer import Trainer


def train_adapters(
    plan: ModelPlan,
    loaded: LoadedModel,
    sequences: TokenSequences,
    scale: Evaluator,
    runtime: Runtime,
    recorder: RunRecorder,
    found: Checkpoint | None = None,
) -> Trainer:
    """Train to the last step, from step 0 or from `found`, and return the trainer. Collective.

    Raises:
        PreemptedError: The run was asked to stop; a checkpoint has its state.
        UserError: A loss or gradient is not finite, and `train.on_nonfinite` says to stop, or has
            already skipped too many batches.
    """
    guard = NonFiniteGuard(runtime, sequences, recorder.nonfinite)
    trainer = Trainer(runtime.config, loaded.model, sequences, runtime, guard)
    with CheckpointManager(trainer, plan, loaded, runtime, recorder, scale.held_out) as keeper:
        keeper.resume(found)
        # A preempted process saves first and leaves out the evaluation; it is made up for here.
        if found and found.state["eval_loss"] is None and _is_evaluation_due(trainer):
            loss = scale.measure_between()
            if loss is not None and runtime.config.ckpt.keep_best:
                keeper.save(loss)
        with recorder.bars.training(trainer.steps, trainer.done.steps):
            for step, metrics in trainer.run(keeper.roll_back):
                recorder.step(step, metrics)
                keeper.after_step(_evaluate_if_due(trainer, scale))
        keeper.end()
        keeper.report()
    return trainer


def _evaluate_if_due(trainer: Trainer, scale: Evaluator) -> float | None:
    """Return the held-out loss after this step, or None if none is due or the run must stop."""
    try:
        return scale.measure_between() if _is_evaluation_due(trainer) else None
    except PreemptedError:  # raised on all ranks; the caller saves a checkpoint and then stops
        trainer.stop_requested = True
        return None


def _is_evaluation_due(trainer: Trainer) -> bool:
    every, ends = trainer.config.eval.every, trainer.is_over or trainer.stop_requested
    return every is not None and trainer.done.steps % every == 0 and not ends
