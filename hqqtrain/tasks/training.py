"""The training itself: the loop, what is measured while it runs, the checkpoints it leaves."""

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
    plan: Plan, built: Built, sequences: Sequences, scale: Scale, session: Session, record: Record,
    found: Checkpoint | None = None,
) -> Trainer:  # fmt: skip
    """Trains to the end, from the beginning or `found`, and returns what did it. Collective.

    Raises:
        PreemptedError: the run was asked to stop; a checkpoint has its state.
        UserError: a loss or gradient is not finite, and `train.on_nonfinite` makes it the end.
    """
    guard = Guard(session, sequences, record.nonfinite)
    trainer = Trainer(session.config, built.model, sequences, session, guard)
    with Keeper(trainer, plan, built, session, record, scale.held_out) as keeper:
        keeper.resume(found)
        if found and found.state["eval_loss"] is None and _is_due(trainer):
            loss = scale.measure_between()  # for which there was no time
            if loss is not None and session.config.ckpt.keep_best:
                keeper.save(loss)
        with record.bars.training(trainer.steps, trainer.done.steps):
            for step, metrics in trainer.run(keeper.roll_back):
                record.step(step, metrics)
                keeper.after_step(_measured(trainer, scale))
        keeper.end()
        keeper.report()
    return trainer


def _measured(trainer: Trainer, scale: Scale) -> float | None:
    """`eval/loss` after this step where it is due, unless the run is to stop."""
    try:
        return scale.measure_between() if _is_due(trainer) else None
    except PreemptedError:  # all ranks were told; the state is saved first
        trainer.is_asked_to_stop = True
        return None


def _is_due(trainer: Trainer) -> bool:
    every, over = trainer.config.eval.every, trainer.is_over or trainer.is_asked_to_stop
    return every is not None and trainer.done.steps % every == 0 and not over
