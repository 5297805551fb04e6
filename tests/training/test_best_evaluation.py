"""The best evaluation: which step is named, and when training stops early."""

import math

import pytest

from hqqtrain.training.best_evaluation import BestEvaluation


def _after(*losses: float) -> BestEvaluation:
    best = BestEvaluation()
    for index, loss in enumerate(losses):
        best.add(10 * (index + 1), loss)
    return best


@pytest.mark.parametrize(
    ("losses", "step", "loss", "without_improvement"),
    [
        ((), None, None, 0),
        ((3.0,), 10, 3.0, 0),
        ((3.0, 2.0, 2.5), 20, 2.0, 1),
        ((3.0, 4.0, 5.0, 2.9), 40, 2.9, 0),
        ((2.0, 2.0), 20, 2.0, 1),  # the later of equal losses, but no improvement
        ((math.nan,), None, None, 1),
        ((math.inf, 9.0, math.nan), 20, 9.0, 1),
    ],
)
def test_the_lowest_loss_is_the_best(losses, step, loss, without_improvement):
    best = _after(*losses)
    assert (best.step, best.loss, best.without_improvement) == (step, loss, without_improvement)


def test_an_evaluation_that_is_repeated_counts_once():
    best = _after(3.0, 4.0)
    best.add(20, 4.0)
    best.add(10, 1.0)
    assert (best.step, best.without_improvement) == (10, 1)


def test_training_stops_once_the_patience_is_used_up():
    best = _after(3.0, 4.0, 3.0)
    assert best.stall_reason(None) is None
    assert best.stall_reason(3) is None
    assert best.stall_reason(2) == (
        "stopped early after step 30: 2 evaluations in a row have not lowered eval/loss, which is "
        "3.0 after step 30"
    )


def test_the_state_is_restored():
    best, other = _after(3.0, 2.0, 4.0), _after(1.0)
    other.load_state_dict(best.state_dict())
    assert other == best
    other.load_state_dict({})  # a checkpoint of an earlier release has none
    assert other == BestEvaluation()
