"""Training of a task: connects the trainer with checkpoints, evaluation and the record."""

from hqqtrain.ckpt import Checkpoint
from hqqtrain.config import PreemptedError
from hqqtrain.data import Sequences
from hqqtrain.tasks.keeper import Keeper
from hqqtrain.tasks.measure import Scale
from hqqtrain.tasks.plan import Plan
from hqqtrain.tasks.prepare import Built
from hqqtrain.tasks.record import Record
from hqqtrain.train.loop import Trainer
from hqqtrain.train.nonfinite import Guard
from hqqtrain.train.session import Session


def train(
    plan: Plan,
    built: Built,
    sequences: Sequences,
    scale: Scale,
    session: Session,
    record: Record,
    found: Checkpoint | None = None,
) -> Trainer:
    """Train to the last step, from step 0 or from `found`, and return the trainer. Collective.

    Raises:
        PreemptedError: The run was asked to stop; a checkpoint has its state.
        UserError: A loss or gradient is not finite, and `train.on_nonfinite` says to stop, or has
            already skipped too many batches.
    """
    guard = Guard(session, sequences, record.nonfinite)
    trainer = Trainer(session.config, built.model, sequences, session, guard)
    with Keeper(trainer, plan, built, session, record, scale.held_out) as keeper:
        keeper.resume(found)
        # A preempted process saves first and leaves out the evaluation; it is made up for here.
        if found and found.state["eval_loss"] is None and _is_evaluation_due(trainer):
            loss = scale.measure_between()
            if loss is not None and session.config.ckpt.keep_best:
                keeper.save(loss)
        with record.bars.training(trainer.steps, trainer.done.steps):
            for step, metrics in trainer.run(keeper.roll_back):
                record.step(step, metrics)
                keeper.after_step(_evaluate_if_due(trainer, scale))
        keeper.end()
        keeper.report()
    return trainer


def _evaluate_if_due(trainer: Trainer, scale: Scale) -> float | None:
    """Return the held-out loss after this step, or None if none is due or the run must stop."""
    try:
        return scale.measure_between() if _is_evaluation_due(trainer) else None
    except PreemptedError:  # raised on all ranks; the caller saves a checkpoint and then stops
        trainer.is_asked_to_stop = True
        return None


def _is_evaluation_due(trainer: Trainer) -> bool:
    every, ends = trainer.config.eval.every, trainer.is_over or trainer.is_asked_to_stop
    return every is not None and trainer.done.steps % every == 0 and not ends
