"""The training itself: the loop, what is measured while it runs, the checkpoints it leaves."""

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
    plan: ModelPlan, loaded: LoadedModel, sequences: TokenSequences, scale: Evaluator, runtime: Runtime, recorder: RunRecorder,
    found: Checkpoint | None = None,
) -> Trainer:  # fmt: skip
    """Trains to the end, from the beginning or `found`, and returns what did it. Collective.

    Raises:
        PreemptedError: the run was asked to stop; a checkpoint has its state.
        UserError: a loss or gradient is not finite, and `train.on_nonfinite` makes it the end.
    """
    guard = NonFiniteGuard(runtime, sequences, recorder.nonfinite)
    trainer = Trainer(runtime.config, loaded.model, sequences, runtime, guard)
    with CheckpointManager(trainer, plan, loaded, runtime, recorder, scale.held_out) as keeper:
        keeper.resume(found)
        if found and found.state["eval_loss"] is None and _is_due(trainer):
            loss = scale.measure_between()  # for which there was no time
            if loss is not None and runtime.config.ckpt.keep_best:
                keeper.save(loss)
        with recorder.bars.training(trainer.steps, trainer.done.steps):
            for step, metrics in trainer.run(keeper.roll_back):
                recorder.step(step, metrics)
                keeper.after_step(_measured(trainer, scale))
        keeper.end()
        keeper.report()
    return trainer


def _measured(trainer: Trainer, scale: Evaluator) -> float | None:
    """`eval/loss` after this step where it is due, unless the run is to stop."""
    try:
        return scale.measure_between() if _is_due(trainer) else None
    except PreemptedError:  # all ranks were told; the state is saved first
        trainer.stop_requested = True
        return None


def _is_due(trainer: Trainer) -> bool:
    every, over = trainer.config.eval.every, trainer.is_over or trainer.stop_requested
    return every is not None and trainer.done.steps % every == 0 and not over
