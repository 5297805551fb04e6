"""Under fp16 the guard leaves overflows to the loss scaler, up to a limit."""

import math
from types import SimpleNamespace

import pytest

from hqqtrain.config import RunConfig
from hqqtrain.dist import ALONE
from hqqtrain.train.nonfinite import OVERFLOWS, Guard
from hqqtrain.train.progress import Step

ENGINE = SimpleNamespace(not_finite=lambda: (3, "lora_B"))


def _guard(scaler: object) -> Guard:
    accelerator = SimpleNamespace(scaler=scaler)
    session = SimpleNamespace(config=RunConfig(), accelerator=accelerator, processes=ALONE)
    return Guard(session, None, None)


def _accepts(guard: Guard, loss: float, norm: float) -> bool:
    return guard.accepts(Step(1, 0, [], 1, loss, norm), ENGINE)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_too_many_overflows_in_a_row_are_refused(norm: float):
    guard = _guard(scaler=object())
    for _ in range(2):
        assert all(_accepts(guard, 1.0, norm) for _ in range(OVERFLOWS))
        assert _accepts(guard, 1.0, 1.0)
    assert all(_accepts(guard, 1.0, norm) for _ in range(OVERFLOWS))
    assert not _accepts(guard, 1.0, norm)


def test_a_loss_that_is_not_finite_is_always_refused():
    assert not _accepts(_guard(scaler=object()), math.nan, 1.0)
    assert not _accepts(_guard(scaler=None), 1.0, math.inf)
