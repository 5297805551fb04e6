"""ZeRO3Engine adds its own methods to DeepSpeed's engine; a stub steps on one process.

`tests/e2e/test_ranks.py` trains with the real one.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.strategies import zero3
from hqqtrain.training import zero3_engine
from hqqtrain.training.engine import ALL_FINITE
from hqqtrain.training.zero3_engine import ZeRO3Engine


class _DeepSpeedEngine:
    """Steps, as DeepSpeed's engine does, before it reveals the gradient norm."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = model, optimizer
        self.boundaries: list[bool] = []
        self.steps = 0

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundaries.append(is_boundary)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(grads)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def get_global_grad_norm(self) -> Tensor:
        return self.norm


@pytest.fixture
def engine(monkeypatch) -> ZeRO3Engine:
    def build(model: nn.Module, optimizer: Any, **settings: Any) -> _DeepSpeedEngine:
        assert settings == {"max_grad_norm": 0.5, "autocast": torch.float32}
        return _DeepSpeedEngine(model, optimizer)

    monkeypatch.setattr(zero3_engine, "build_deepspeed_engine", build)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
    return ZeRO3Engine(
        model, dict(model.named_parameters()), OptimConfig(lr=0.1), autocast=torch.float32,
        device=torch.device("cpu"), max_grad_norm=0.5,
    )  # fmt: skip


def _backward(engine: ZeRO3Engine, *factors: float) -> None:
    for number, factor in enumerate(factors):
        with engine.accumulating(last=number == len(factors) - 1):
            engine.backward(engine.model(torch.ones(3, 4)).square().sum() * factor)


def test_only_the_last_micro_batch_is_a_boundary(engine: ZeRO3Engine):
    _backward(engine, 1.0, 1.0, 1.0)
    assert engine.model.boundaries == [False, False, True]


def test_the_norm_comes_from_a_step_with_the_learning_rate(engine: ZeRO3Engine):
    before = [param.detach().clone() for param in engine.model.module.parameters()]
    _backward(engine, 1.0)
    grads = [param.grad.clone() for param in engine.model.module.parameters()]
    norm = engine.grad_norm(0.25)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in grads)))
    engine.step(0.25)
    assert engine.model.steps == 1  # `step` itself takes none
    for old, grad, new in zip(before, grads, engine.model.module.parameters(), strict=True):
        expected = nn.Parameter(old)
        expected.grad = grad
        torch.optim.AdamW([expected], lr=0.25, weight_decay=0.0).step()
        torch.testing.assert_close(new, expected)


@pytest.mark.parametrize("clean_up", ["step", "skip_step"])
def test_a_gradient_that_deepspeed_takes_away_was_seen(engine: ZeRO3Engine, clean_up: str):
    _backward(engine, math.nan, 1.0)
    engine.grad_norm(0.1)
    assert all(param.grad is None for param in engine.model.module.parameters())
    assert engine.first_nonfinite_gradient() == (1, "1.weight")
    engine.step(0.1) if clean_up == "step" else engine.skip_step()
    assert engine.first_nonfinite_gradient() == ALL_FINITE


def test_the_moments_are_loaded_by_parameter(engine: ZeRO3Engine, monkeypatch):
    loaded: list[tuple] = []
    monkeypatch.setattr(zero3, "load_moments", lambda *arguments: loaded.append(arguments))
    engine.load_optimizer({}, 0)
    assert loaded == []  # nothing was saved before the first step
    names = [f"{n}.weight/{key}" for n in "01" for key in zero3.MOMENTS]
    saved = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    engine.load_optimizer(saved, 3)
    ((model, step, moments),) = loaded
    assert (model, step) == (engine.model, 3)
    first, second = engine.model.module.parameters()
    assert moments[first] == {key: saved[f"0.weight/{key}"] for key in zero3.MOMENTS}
    assert moments[second] == {key: saved[f"1.weight/{key}"] for key in zero3.MOMENTS}


def test_gradients_are_not_scaled(engine: ZeRO3Engine):
    assert engine.scaler_state() is None
    engine.load_scaler({"scale": 1.0})
