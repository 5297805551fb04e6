"""The training itself: the loop, what is measured while it runs, the checkpoints it leaves."""

from hqqtrain.ckpt import Checkpoint
from hqqtrain.data import Sequences
from hqqtrain.train.keeper import Keeper
from hqqtrain.train.loop import Trainer
from hqqtrain.train.measure import Scale
from hqqtrain.train.nonfinite import Guard
from hqqtrain.train.plan import Plan
from hqqtrain.train.prepare import Built
from hqqtrain.train.record import Record
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
    every = session.config.eval.every
    guard = Guard(session, sequences, record.nonfinite)
    trainer = Trainer(session.config, built.model, sequences, session, guard)
    with Keeper(trainer, plan, built, session, record, record.checkpoints) as keeper:
        keeper.resume(found)
        with record.training(trainer.steps, trainer.done.steps):
            for step, metrics in trainer.run(keeper.roll_back):
                record.step(step, metrics)
                measured = every and step % every == 0 and not trainer.is_over
                keeper.after_step(scale.measure_between() if measured else None)
        keeper.end()
    return trainer
