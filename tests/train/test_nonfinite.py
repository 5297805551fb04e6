"""Under fp16 the guard leaves overflows to the loss scaler, up to a limit."""

import math
from types import SimpleNamespace

import pytest

from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.train.nonfinite import MAX_OVERFLOWS_IN_A_ROW, NonFiniteGuard
from hqqtrain.train.state import StepResult

ENGINE = SimpleNamespace(not_finite=lambda: (3, "lora_B"))


def _guard(scaler: object) -> NonFiniteGuard:
    accelerator = SimpleNamespace(scaler=scaler)
    runtime = SimpleNamespace(config=RunConfig(), accelerator=accelerator, comm=SINGLE_PROCESS)
    return NonFiniteGuard(runtime, None, None)


def _accepts(guard: NonFiniteGuard, loss: float, norm: float) -> bool:
    return guard.accepts(StepResult(1, 0, [], 1, loss, norm), ENGINE)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_too_many_overflows_in_a_row_are_refused(norm: float):
    guard = _guard(scaler=object())
    for _ in range(2):
        assert all(_accepts(guard, 1.0, norm) for _ in range(MAX_OVERFLOWS_IN_A_ROW))
        assert _accepts(guard, 1.0, 1.0)
    assert all(_accepts(guard, 1.0, norm) for _ in range(MAX_OVERFLOWS_IN_A_ROW))
    assert not _accepts(guard, 1.0, norm)


def test_a_loss_that_is_not_finite_is_always_refused():
    assert not _accepts(_guard(scaler=object()), math.nan, 1.0)
    assert not _accepts(_guard(scaler=None), 1.0, math.inf)
