"""Between two steps of a training: when the model is evaluated, and what a stop does."""

from types import SimpleNamespace

import pytest
from torch import nn

from hqqtrain.common.errors import PreemptedError
from hqqtrain.tasks.training import AdapterTraining
from hqqtrain.training.best_evaluation import BestEvaluation
from hqqtrain.training.state import StepResult, TrainState


class _Trainer:
    """A trainer that only counts its steps, and is asked to stop during `stop_at`."""

    def __init__(self, total_steps: int, stop_at: int | None = None) -> None:
        self.loader = SimpleNamespace(total_steps=total_steps, epoch=lambda index: index / 10)
        self.state, self.stop_at, self.stop_requested = TrainState(), stop_at, False
        self.stopped_early = False

    @property
    def is_over(self) -> bool:
        return self.stopped_early or self.state.steps >= self.loader.total_steps

    def run(self, roll_back):
        while not self.is_over:
            step = StepResult(self.state.steps + 1, self.state.steps, 10, 1.5, seconds=1.0)
            self.state.add(step)
            self.stop_requested = self.state.steps == self.stop_at
            yield step


class _Checkpoints:
    """Notes what is saved, and stops the run as the real manager does."""

    def __init__(self) -> None:
        self.after: list[tuple[float | None, bool]] = []
        self.saved: list[float | None] = []

    def resume(self, checkpoint) -> None:
        self.resumed_from = checkpoint

    def save(self, loss: float | None = None) -> None:
        self.saved.append(loss)

    def after_step(self, eval_loss: float | None, *, stop_requested: bool) -> None:
        self.after.append((eval_loss, stop_requested))
        if stop_requested:
            raise PreemptedError("SIGUSR1 was received")

    def save_before_stop(self, eval_loss: float | None) -> None:
        assert eval_loss == self.after[-1][0]

    def roll_back(self) -> None: ...

    def wait_for_write(self) -> None: ...

    def log_waiting_time(self) -> None: ...


class _Evaluation:
    """Returns 1, 2, ... as losses; is interrupted in its evaluation number `interrupt`."""

    def __init__(self, interrupt: int = 0) -> None:
        self.count, self.interrupt = 0, interrupt

    def evaluate_during_training(self) -> float:
        self.count += 1
        if self.count == self.interrupt:
            raise PreemptedError("SIGUSR1 was received")
        return float(self.count)


@pytest.fixture
def make_training(make_config, start_run):
    """Return a function that makes an `AdapterTraining` around stand-ins."""
    with start_run(make_config(eval={"every": 2}, ckpt={"keep_best": 1})) as run:

        def make(
            trainer: _Trainer, evaluation: _Evaluation
        ) -> tuple[AdapterTraining, _Checkpoints]:
            checkpoints = _Checkpoints()
            model = nn.Linear(2, 2)
            return AdapterTraining(
                run, model, trainer, evaluation, checkpoints, BestEvaluation()
            ), checkpoints

        yield make


def test_the_model_is_evaluated_every_few_steps_but_not_at_the_end(make_training):
    training, checkpoints = make_training(_Trainer(6), _Evaluation())
    training.train()
    assert checkpoints.after == [
        (None, False), (1.0, False), (None, False), (2.0, False), (None, False), (None, False)
    ]  # fmt: skip
    assert checkpoints.saved == []


def test_a_request_to_stop_leaves_out_the_evaluation(make_training):
    training, checkpoints = make_training(_Trainer(6, stop_at=4), _Evaluation())
    with pytest.raises(PreemptedError):
        training.train()
    assert checkpoints.after == [(None, False), (1.0, False), (None, False), (None, True)]


def test_an_interrupted_evaluation_saves_and_then_stops(make_training):
    training, checkpoints = make_training(_Trainer(6), _Evaluation(interrupt=2))
    with pytest.raises(PreemptedError):
        training.train()
    assert checkpoints.after[-1] == (None, True)


@pytest.mark.parametrize(("step", "eval_loss", "saved"), [
    (4, None, [1.0]), (4, 2.5, []), (3, None, []), (0, None, None),
])  # fmt: skip
def test_the_evaluation_that_a_stop_has_left_out_is_made_up_for(
    make_training, step: int, eval_loss: float | None, saved: list[float] | None
):
    trainer = _Trainer(6)
    trainer.state.steps = step
    training, checkpoints = make_training(trainer, _Evaluation())
    checkpoint = None if saved is None else SimpleNamespace(state={"eval_loss": eval_loss})
    training.train(checkpoint)
    assert checkpoints.resumed_from is checkpoint
    assert checkpoints.saved == (saved or [])


def test_consistency_is_checked_every_few_steps_and_at_the_end(make_training, monkeypatch):
    checks: list[int] = []
    trainer = _Trainer(5)

    class Checker:
        def __init__(self, model, comm) -> None:
            self.checks = 0

        def check(self) -> None:
            checks.append(trainer.state.steps)

    monkeypatch.setattr("hqqtrain.tasks.training.ConsistencyChecker", Checker)
    training, _ = make_training(trainer, _Evaluation())
    training._run.config.parallel.consistency_check_every = 2
    training.train()
    assert checks == [2, 4, 5]


def test_training_stops_early_without_improvement(make_training):
    trainer = _Trainer(20)
    training, checkpoints = make_training(trainer, _Evaluation())  # every evaluation is worse
    training._run.config.train.early_stopping_patience = 3
    training.train()
    assert trainer.state.steps == 8
    assert trainer.stopped_early
    assert checkpoints.after[-1] == (4.0, False)


def test_a_resumed_training_keeps_its_patience(make_training):
    trainer, best = _Trainer(20), BestEvaluation(2, 0.5, 2, 6)
    trainer.state.steps = 6
    training, _ = make_training(trainer, _Evaluation())
    training._run.config.train.early_stopping_patience = 3
    state = {"eval_loss": 0.7, "best_evaluation": best.state_dict()}
    training.train(SimpleNamespace(state=state))
    assert trainer.state.steps == 8
    # Resumed once more, it takes no step; with more patience, it goes on.
    state["best_evaluation"] = training._best.state_dict()
    training.train(SimpleNamespace(state=state))
    assert trainer.state.steps == 8
    training._run.config.train.early_stopping_patience = 4
    training.train(SimpleNamespace(state=state))
    assert trainer.state.steps == 10
