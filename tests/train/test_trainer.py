"""The trainer on a tiny model in one process: its steps, its state, and batches it leaves out."""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.checkpoint.snapshot import StateSnapshot
from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import OptimConfig, TrainConfig
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.data.loader import PackedLoader
from hqqtrain.data.packing import TokenSequences, plain_text_targets
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.train.losses.model_loss import ModelLoss
from hqqtrain.train.losses.next_token import NextTokenLoss
from hqqtrain.train.nonfinite import NonFiniteGuard
from hqqtrain.train.schedule import LearningRateSchedule
from hqqtrain.train.torch_engine import TorchEngine
from hqqtrain.train.trainables import trainable_parameters
from hqqtrain.train.trainer import Trainer, seed_dropout

STEPS = 6


def make_sequences() -> TokenSequences:
    stream = (np.arange(9 * 12) * 7 % 32).astype(np.int32)
    starts = np.arange(0, len(stream), 12)
    return TokenSequences(stream, plain_text_targets(stream, starts), starts, starts, starts + 12)


def make_trainer(
    policy: str = "stop", record: Callable[..., object] = lambda *_: None, **train: Any
) -> Trainer:
    """Build the same trainer each time; its model has dropout and one frozen parameter."""
    settings = {"max_steps": STEPS, "global_batch_size": 3, "micro_batch_size": 2, "seed": 5}
    config, optim = TrainConfig(**settings | train), OptimConfig(lr=0.01, warmup_steps=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.1)
    )  # fmt: skip
    model.get_input_embeddings().weight.requires_grad_(False)
    trainables, loader = trainable_parameters(model), PackedLoader(make_sequences(), config)
    engine = TorchEngine(model, trainables, Accelerator(cpu=True), optim, max_grad_norm=1.0)
    loss = ModelLoss(model, NextTokenLoss(), SINGLE_PROCESS, max_tokens=24)
    return Trainer(
        engine, trainables, loader, loss, LearningRateSchedule(optim, loader.total_steps),
        NonFiniteGuard(policy, SINGLE_PROCESS, record), SINGLE_PROCESS,
        PreemptionHandler(RunDirConfig()), config.seed,
    )  # fmt: skip


def saved_state(trainer: Trainer) -> dict[str, Any]:
    """Return the trainer's state with full tensors, as a checkpoint has it."""
    state, snapshot = trainer.state_dict(), StateSnapshot(SINGLE_PROCESS)
    snapshot.take(state["tensors"])
    return state | {"tensors": {k: t.clone() for k, t in snapshot.tensors().items()}}


def run(trainer: Trainer, roll_back: Callable[[], object] = lambda: None) -> list[float]:
    return [step.loss for step in trainer.run(roll_back)]


def poison(trainer: Trainer, *batch_indices: int) -> None:
    """Make the loss of these global batches NaN."""
    loss = trainer.loss

    def poisoned(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        total, count = loss(batch)
        return total * (math.nan if trainer.state.next_batch_index in batch_indices else 1), count

    trainer.loss = poisoned  # type: ignore[assignment]


def test_a_step_is_that_of_plain_pytorch():
    trainer, alone = make_trainer(), make_trainer()
    result = trainer.step()
    model, parameters = alone.engine.model.train(), list(alone.trainable_parameters.values())
    batches = list(alone.loader.batches(0))
    tokens = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    seed_dropout(5, 0, 0)
    losses = [
        model(**batch, use_cache=False).loss * int((batch["labels"] >= 0).sum())
        for batch in batches
    ]
    loss = torch.stack(losses).sum() / tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=0.005, weight_decay=0.0).step()
    assert (result.number, result.batch_index, result.tokens) == (1, 0, tokens)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert result.learning_rate == 0.005  # the first of two warm-up steps
    assert result.peak_memory_gib > 0
    for name, ours in trainer.trainable_parameters.items():
        torch.testing.assert_close(ours, alone.trainable_parameters[name], rtol=1e-3, atol=1e-5)


def test_training_lowers_the_loss_and_counts():
    trainer = make_trainer()
    losses = run(trainer)
    assert losses[-1] < losses[0]
    assert (trainer.state.steps, trainer.state.loss, trainer.is_over) == (STEPS, losses[-1], True)
    assert trainer.state.tokens == STEPS * 3 * 11
    assert trainer.state.seconds > 0
    assert trainer.engine.step_count == STEPS
    assert run(trainer) == []


@pytest.mark.parametrize("after", [1, 3])
def test_a_restored_trainer_repeats_the_uninterrupted_one(after: int):
    whole = make_trainer()
    losses = run(whole)
    stopped = make_trainer()
    for _ in range(after):
        stopped.step()
    state, resumed = saved_state(stopped), make_trainer()
    resumed.load_state_dict(state)
    assert run(resumed) == losses[after:]
    ours, theirs = saved_state(resumed), saved_state(whole)
    assert ours["trained"] | {"seconds": 0} == theirs["trained"] | {"seconds": 0}
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    assert all(torch.equal(ours["tensors"][k], theirs["tensors"][k]) for k in theirs["tensors"])


def test_stop_raises_before_the_weights_change():
    records: list[tuple] = []
    trainer = make_trainer("stop", lambda *facts: records.append(facts))
    trainer.step()
    before = saved_state(trainer)["tensors"]
    poison(trainer, 1)
    with pytest.raises(UserError, match="global batch 1 gives loss nan"):
        run(trainer)
    ((step, facts),) = records
    assert (step.number, step.batch_index, step.was_taken) == (2, 1, False)
    assert facts["policy"] == "stop"
    after = saved_state(trainer)["tensors"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_skip_leaves_the_batch_out(caplog: pytest.LogCaptureFixture):
    trainer = make_trainer("skip")
    poison(trainer, 2)
    with caplog.at_level(logging.WARNING):
        assert len(run(trainer)) == STEPS
    assert "global batch 2 is skipped" in caplog.text
    assert (trainer.state.skipped, trainer.state.next_batch_index) == (1, STEPS + 1)


def test_rollback_leaves_out_the_batches_since_the_checkpoint():
    trainer = make_trainer("rollback")
    trainer.step()
    state = saved_state(trainer)
    poison(trainer, 3)
    losses = run(trainer, lambda: trainer.load_state_dict(state))
    assert len(losses) == 2 + (STEPS - 1)  # two steps were lost
    assert (trainer.state.steps, trainer.state.skipped) == (STEPS, 3)


def test_a_request_to_stop_is_known_after_the_step(monkeypatch: pytest.MonkeyPatch):
    trainer = make_trainer()
    trainer.step()
    assert not trainer.stop_requested
    monkeypatch.setattr(PreemptionHandler, "stop_reason", "SIGUSR1 was received")
    trainer.step()
    assert trainer.stop_requested


def test_the_seed_of_dropout_is_fixed():
    """A resumed run of another version must drop the same activations."""
    seed_dropout(0, 3, 1)
    assert torch.initial_seed() == 2236338143322339785
