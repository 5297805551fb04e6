"""The order of columns, feedback and correction, compared with direct solutions in fp64."""

import pytest
import torch
from torch import Tensor

from hqqtrain.quant.calibrated import statistics as module
from hqqtrain.quant.calibrated.statistics import InputStatistics, plan_columns


def gram_of(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def test_columns_with_large_inputs_come_first_and_groups_stay_together() -> None:
    gram = torch.diag(torch.tensor([1.0, 9.0, 2.0, 3.0, 0.5, 4.0]))
    along_rows = plan_columns(InputStatistics(gram), 2, 1, has_feedback=True)
    assert along_rows.columns.tolist() == [1, 0, 5, 4, 3, 2]
    down_columns = plan_columns(InputStatistics(gram), 2, 0, has_feedback=True)
    assert down_columns.columns.tolist() == [1, 5, 3, 2, 0, 4]
    expected = gram.diagonal() / gram.diagonal().mean()
    assert torch.allclose(down_columns.importance, expected[down_columns.columns])
    weights_only = plan_columns(InputStatistics(gram), 2, 1, has_feedback=False)
    assert weights_only.columns.tolist() == list(range(6))
    assert weights_only.feedback is None


def test_feedback_is_the_best_change_of_the_later_columns() -> None:
    gram = gram_of(torch.randn(500, 24) @ torch.randn(24, 24))
    plan = plan_columns(InputStatistics(gram), 1, 0, has_feedback=True)
    damped = gram.double() + torch.eye(24) * module.FEEDBACK_DAMPING * gram.diagonal().mean()
    damped = damped[plan.columns][:, plan.columns]
    assert plan.feedback is not None
    for column in range(23):
        # W - V is 1 in this column. Which W - V of the later ones gives the least error?
        later = slice(column + 1, None)
        best = torch.linalg.solve(damped[later, later], -damped[later, column])
        # Feedback moves the weight that is still to be quantized: W - V = -change.
        assert torch.allclose(plan.feedback[column, later].double(), -best, atol=1e-4)
    assert not plan.feedback.tril().any()


def test_the_correction_is_a_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CORRECTION_SHARE", 1.0)
    x = torch.randn(600, 20, dtype=torch.float64)
    f, W = x + 0.3 * torch.randn_like(x), torch.randn(7, 20, dtype=torch.float64)
    statistics = InputStatistics(gram_of(x).float(), (f.t() @ x / len(x)).float())
    plan = plan_columns(statistics, 4, 1, has_feedback=True)
    assert plan.correction is not None
    found = W + W @ plan.correction.double()
    # min_V |V x - W f|^2 + |(V - W) sqrt(damping)|^2, as one system of equations.
    damping = (module.CORRECTION_DAMPING * gram_of(x).diagonal()).sqrt().diag() * len(x) ** 0.5
    expected = torch.linalg.lstsq(torch.cat([x, damping]), torch.cat([f @ W.t(), damping @ W.t()]))
    assert torch.allclose(found, expected.solution.t(), atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_channels_that_are_never_used(scale: float) -> None:
    x = torch.randn(300, 16) * scale
    x[:, 3:9] = 0
    plan = plan_columns(InputStatistics(gram_of(x), gram_of(x)), 4, 1, has_feedback=True)
    assert plan.feedback is not None
    assert plan.correction is not None
    assert plan.feedback.isfinite().all()
    assert plan.correction.isfinite().all()
    assert (plan.importance > 0).all()
    assert sorted(plan.columns.tolist()) == list(range(16))


def test_fewer_tokens_than_channels() -> None:
    x = torch.randn(5, 64)
    plan = plan_columns(InputStatistics(gram_of(x)), 8, 1, has_feedback=True)
    assert plan.feedback is not None
    assert plan.feedback.isfinite().all()
