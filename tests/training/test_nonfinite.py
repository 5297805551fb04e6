"""The guard refuses steps that are not finite, but leaves overflows of fp16 to the loss scaler."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.training.nonfinite import (
    MAX_OVERFLOWS_IN_A_ROW,
    MAX_REFUSED_IN_A_ROW,
    NonFiniteGuard,
    first_nonfinite_output,
)
from hqqtrain.training.state import StepResult


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, use_cache: bool) -> torch.Tensor:
        return self.second(self.first(x))


def make_guard(
    policy: str = "stop", *, scales_gradients: bool = False
) -> tuple[NonFiniteGuard, list[dict[str, Any]]]:
    """Return a guard and the list of the causes that it records."""
    records: list[dict[str, Any]] = []
    guard = NonFiniteGuard(policy, SINGLE_PROCESS, lambda _, cause: records.append(cause),
                           scales_gradients=scales_gradients)  # fmt: skip
    return guard, records


def allows(guard: NonFiniteGuard, loss: float, norm: float) -> bool:
    return guard.allows_step(StepResult(1, 0, 1, loss, grad_norm=norm))


def refuse(guard: NonFiniteGuard, model: nn.Module, gradient: tuple[int, str] = (-1, "")) -> None:
    step = StepResult(1, 0, 1, math.nan)
    assert not guard.allows_step(step)
    guard.handle_refused(step, gradient, model, [{"x": torch.ones(2, 3)}])


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_too_many_overflows_in_a_row_are_refused(norm: float):
    guard, _ = make_guard(scales_gradients=True)
    for _ in range(2):
        assert all(allows(guard, 1.0, norm) for _ in range(MAX_OVERFLOWS_IN_A_ROW))
        assert allows(guard, 1.0, 1.0)
    assert all(allows(guard, 1.0, norm) for _ in range(MAX_OVERFLOWS_IN_A_ROW))
    assert not allows(guard, 1.0, norm)


def test_a_loss_that_is_not_finite_is_always_refused():
    assert not allows(make_guard(scales_gradients=True)[0], math.nan, 1.0)
    assert not allows(make_guard()[0], 1.0, math.inf)


def test_the_cause_is_the_first_output_or_else_a_gradient_or_unknown():
    guard, records = make_guard("skip")
    model = Model()
    refuse(guard, model, (3, "lora_B"))
    assert allows(guard, 1.0, 1.0)
    refuse(guard, model)
    model.second.bias.data[1] = torch.inf
    refuse(guard, model, (3, "lora_B"))
    assert records == [
        {"layer": "lora_B", "what": "gradient", "policy": "skip"},
        {"layer": "no layer by itself", "what": "gradient", "policy": "skip"},
        {"layer": "second", "what": "output", "policy": "skip"},
    ]


def test_only_a_finite_step_resets_the_count_under_skip():
    guard, _ = make_guard("skip")
    for _ in range(MAX_REFUSED_IN_A_ROW - 1):
        refuse(guard, Model())
    assert allows(guard, 1.0, 1.0)
    for _ in range(MAX_REFUSED_IN_A_ROW - 1):
        refuse(guard, Model())
    with pytest.raises(UserError, match=f"{MAX_REFUSED_IN_A_ROW} times in a row"):
        refuse(guard, Model())


def test_only_a_checkpoint_resets_the_count_under_rollback():
    guard, _ = make_guard("rollback")
    for _ in range(MAX_REFUSED_IN_A_ROW - 1):
        refuse(guard, Model())
    assert allows(guard, 1.0, 1.0)
    guard.checkpoint_saved()
    for _ in range(MAX_REFUSED_IN_A_ROW - 1):
        refuse(guard, Model())
        assert allows(guard, 1.0, 1.0)
    with pytest.raises(UserError, match=f"{MAX_REFUSED_IN_A_ROW} times in a row"):
        refuse(guard, Model())


def test_stop_ends_the_run():
    with pytest.raises(UserError, match=r"train\.on_nonfinite=stop: global batch 0 gives loss nan"):
        refuse(make_guard("stop")[0], Model())


def test_the_first_layer_of_a_forward_pass_is_named():
    model = Model()
    model.second.bias.data[1] = torch.inf
    assert first_nonfinite_output(model, {"x": torch.ones(2, 3)}) == "second"
    assert first_nonfinite_output(model, {"x": torch.full((2, 3), torch.nan)}) == "first"
    model.second.bias.data[1] = 0
    assert first_nonfinite_output(model, {"x": torch.ones(2, 3)}) == ""
    assert not model.first._forward_hooks
