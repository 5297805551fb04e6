"""PyTorch's engine: the norm before clipping, a step, and a step that is left out."""

import math

import pytest
import torch
from accelerate import Accelerator
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.comm import Communicator
from hqqtrain.training.engine import ALL_FINITE
from hqqtrain.training.torch_engine import TorchEngine

LEARNING_RATE = 0.5


def make_engine(max_grad_norm: float | None = None, mesh: DeviceMesh | None = None) -> TorchEngine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    for param in (model[0].bias, model[1].bias):
        param.requires_grad_(False)
    if mesh:
        fully_shard(model, mesh=mesh)
    named = {name: param for name, param in model.named_parameters() if name.endswith("weight")}
    optim = OptimConfig(lr=0.1)
    return TorchEngine(model, named, Accelerator(cpu=True), optim, max_grad_norm=max_grad_norm)


def backward(engine: TorchEngine, factor: float = 1.0) -> None:
    """Run two micro-batches."""
    for number in range(2):
        with engine.accumulating(last=number == 1):
            engine.backward(engine.model(torch.ones(3, 4)).square().sum() * factor)


def weights(engine: TorchEngine) -> list[torch.Tensor]:
    return [shard.tensor.clone() for name, shard in engine.local_state().items() if "/" not in name]


def gradients(engine: TorchEngine) -> list[torch.Tensor | None]:
    return [p.grad for name, p in engine.model.named_parameters() if name.endswith("weight")]


@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
def test_a_step_clips_by_the_norm_and_uses_the_learning_rate(max_grad_norm: float | None):
    engine = make_engine(max_grad_norm)
    backward(engine)
    grads = [grad.clone() for grad in gradients(engine) if grad is not None]
    before, norm = weights(engine), engine.grad_norm(LEARNING_RATE)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in grads)))
    engine.step(LEARNING_RATE)
    assert engine.step_count == 1
    assert gradients(engine) == [None, None]
    scale = 1 if max_grad_norm is None else max_grad_norm / norm
    for old, new, grad in zip(before, weights(engine), grads, strict=True):
        expected = nn.Parameter(old)
        expected.grad = grad * scale
        torch.optim.AdamW([expected], lr=LEARNING_RATE, weight_decay=0.0).step()
        torch.testing.assert_close(new, expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_step_that_is_left_out_changes_nothing():
    engine = make_engine()
    before = weights(engine)
    backward(engine, math.nan)
    assert math.isnan(engine.grad_norm(LEARNING_RATE))
    assert engine.first_nonfinite_gradient() == (1, "1.weight")  # backward, it comes first
    engine.skip_step()
    assert gradients(engine) == [None, None]
    assert engine.step_count == 0
    assert all(torch.equal(old, new) for old, new in zip(before, weights(engine), strict=True))
    backward(engine)
    assert math.isfinite(engine.grad_norm(LEARNING_RATE))
    assert engine.first_nonfinite_gradient() == ALL_FINITE


@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
def test_a_launched_step_is_the_same_step(max_grad_norm: float | None):
    launched, plain = make_engine(max_grad_norm), make_engine(max_grad_norm)
    for _ in range(2):
        for engine in (launched, plain):
            backward(engine)
            engine.grad_norm(LEARNING_RATE)
        launched.launch_step(LEARNING_RATE, torch.tensor(1.0))
        for engine in (launched, plain):
            engine.step(LEARNING_RATE)
    assert launched.step_count == plain.step_count == 2
    assert gradients(launched) == [None, None]
    for ours, theirs in zip(weights(launched), weights(plain), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.0])
def test_a_launched_step_that_is_not_finite_changes_nothing(loss: float):
    engine = make_engine(0.01)
    for steps in range(2):
        before = {name: shard.tensor.clone() for name, shard in engine.local_state().items()}
        backward(engine, 1.0 if loss != 1 else math.nan)
        grads = [grad.clone() for grad in gradients(engine) if grad is not None]
        engine.grad_norm(LEARNING_RATE)
        engine.launch_step(LEARNING_RATE, torch.tensor(loss))
        after = [grad for grad in gradients(engine) if grad is not None]
        torch.testing.assert_close(after, grads, rtol=0, atol=0, equal_nan=True)  # for the cause
        engine.skip_step()
        assert engine.step_count == steps
        state = {name: shard.tensor for name, shard in engine.local_state().items()}
        torch.testing.assert_close(state, before, rtol=0, atol=0)
        backward(engine)
        engine.grad_norm(LEARNING_RATE)
        engine.launch_step(LEARNING_RATE, torch.tensor(1.0))
        engine.step(LEARNING_RATE)


def sharded_steps(rank: int, comm: Communicator) -> None:
    alone = make_engine(0.01)
    for launches in (True, False):
        engine = make_engine(0.01, init_device_mesh("cpu", (comm.size,)))
        for factor in (1.0, math.nan, 1.0):
            for each in (engine, alone):
                backward(each, factor)
                norm = each.grad_norm(LEARNING_RATE)
                if launches or each is alone:
                    each.launch_step(LEARNING_RATE, torch.tensor(1.0))
                each.step(LEARNING_RATE) if norm.isfinite() else each.skip_step()
        assert engine.step_count == 2
        full = [param.full_tensor() for param in engine.model.parameters() if param.requires_grad]
        if launches:
            expected = weights(alone)
        torch.testing.assert_close(full, expected)


@pytest.mark.ranks
def test_a_launched_step_of_shards():
    assert on_ranks(sharded_steps, 2) == ["", ""]


def test_state_has_a_name_for_each_tensor():
    engine = make_engine()
    assert set(engine.local_state()) == {"0.weight", "1.weight"}
    backward(engine)
    engine.grad_norm(LEARNING_RATE)
    engine.step(LEARNING_RATE)
    moments = {f"{n}.weight/{key}" for n in "01" for key in ("exp_avg", "exp_avg_sq")}
    assert set(engine.local_state()) == {"0.weight", "1.weight"} | moments
