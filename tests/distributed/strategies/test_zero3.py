"""Training state passes in and out of DeepSpeed's flat shards without a change."""

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn

from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.local import copy_from_full
from hqqtrain.distributed.strategies import zero3
from hqqtrain.distributed.strategies.zero3 import MAX_LIVE_NUMEL, REDUCE_BUCKET_NUMEL, ZeRO3


def _model() -> nn.Module:
    """Return parameters of 15, 3 and 7 elements, which two ranks cannot share evenly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7, bias=False))
    return model


def _loss(model: nn.Module, step: int) -> Tensor:
    torch.manual_seed(step)
    return model(torch.randn(4, 5)).square().mean()


def _engine(model: nn.Module, comm: Communicator) -> object:
    """Return the engine for training of a model that went through what `ZeRO3.wrap` does."""
    zero3.partition_parameters(model, comm.device)
    inference = zero3._deepspeed(comm.device).initialize(model=model, config=zero3._config())[0]
    vars(model)[zero3._INFERENCE_ENGINE] = inference
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return zero3.build_deepspeed_engine(
        model, optimizer, max_grad_norm=None, autocast=torch.float32
    )


def _train(engine: object, steps: range) -> None:
    for step in steps:
        engine.backward(_loss(engine, step))
        engine.step()


def _gathered(engine: object, model: nn.Module, comm: Communicator) -> dict[str, Tensor]:
    """Join the shards of the ranks and cut off the padding."""
    found = {}
    for name, param in model.named_parameters():
        for key, part in zero3.local_training_state(engine, param).items():
            assert part.numel() == zero3.shard_numel(param)
            full = torch.cat(comm.all_gather_object(part))
            found[f"{name}/{key}"] = full[: param.ds_numel].view(param.ds_shape)
    return found


def trains_and_resumes(rank: int, comm: Communicator) -> None:
    alone = _model()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.1)
    model = _model()
    engine = _engine(model, comm)
    assert all(map(zero3.is_partitioned, model.parameters()))
    assert zero3.optimizer_step_count(engine) == 0
    assert set(_gathered(engine, model, comm)) == {f"{n}/" for n, _ in alone.named_parameters()}

    def assert_same(found: dict[str, Tensor]) -> None:
        for name, param in alone.named_parameters():
            torch.testing.assert_close(found[f"{name}/"], param.detach())
            for key in zero3.MOMENTS:
                torch.testing.assert_close(found[f"{name}/{key}"], optimizer.state[param][key])

    def step_alone(step: int) -> None:
        optimizer.zero_grad()
        _loss(alone, step).backward()
        optimizer.step()

    for step in range(2):
        step_alone(step)
    _train(engine, range(2))
    assert zero3.optimizer_step_count(engine) == 2
    saved = _gathered(engine, model, comm)
    assert_same(saved)
    torch.testing.assert_close(zero3.gather_parameter(model[0].weight), alone[0].weight.detach())

    resumed = _model()
    with torch.no_grad():
        for name, param in resumed.named_parameters():
            param.copy_(saved[f"{name}/"])
    engine = _engine(resumed, comm)
    moments = {
        param: {key: saved[f"{name}/{key}"] for key in zero3.MOMENTS}
        for name, param in resumed.named_parameters()
    }
    zero3.load_moments(engine, 2, moments)
    step_alone(2)
    _train(engine, range(2, 3))
    assert zero3.optimizer_step_count(engine) == 3
    assert_same(_gathered(engine, resumed, comm))
    for name, param in resumed.named_parameters():  # as when the best checkpoint is loaded
        copy_from_full(param, saved[f"{name}/"])
        torch.testing.assert_close(zero3.gather_parameter(param), saved[f"{name}/"], rtol=0, atol=0)
    with torch.no_grad():
        expected = F.linear(torch.ones(1, 5), saved["0.weight/"], saved["0.bias/"])
        torch.testing.assert_close(resumed[0](torch.ones(1, 5)), expected)


@pytest.mark.ranks
def test_two_ranks_train_and_resume_like_adamw():
    pytest.importorskip("deepspeed")
    assert on_ranks(trains_and_resumes, 2) == ["", ""]


def test_what_deepspeed_has_not_seen_is_not_partitioned():
    assert not zero3.is_partitioned(nn.Parameter(torch.ones(3)))


def test_gathered_layers_are_bounded_by_the_model():
    strategy, bucket = ZeRO3(SINGLE_PROCESS), REDUCE_BUCKET_NUMEL * 4
    sizes = {"root": 80, "itemsize": 2}
    assert strategy.gathered_bytes(8, layers=1000, **sizes) == 70 + 1000 + bucket
    large = strategy.gathered_bytes(8, layers=1 << 40, **sizes)
    assert large == 70 + 2 * MAX_LIVE_NUMEL + bucket
