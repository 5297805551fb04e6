"""The manager saves when a checkpoint is due, restores a trainer, and rolls it back."""

import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_trainer import STEPS, make_trainer, poison, saved_state

from hqqtrain.checkpoint.format import write_checkpoint
from hqqtrain.checkpoint.manager import CheckpointContents, CheckpointManager
from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.config.infra import CheckpointConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.formats.adapter_base import BaseModelRef
from hqqtrain.training.trainer import Trainer


class Counter:
    """A part of the run with state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def state_dict(self) -> dict[str, Any]:
        self.calls += 1
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2, keep_best=1)


def make_manager(trainer: Trainer, store: CheckpointStore, **config: Any) -> CheckpointManager:
    lora, base = (
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        BaseModelRef("tiny", None, "sha256:00"),
    )
    contents = CheckpointContents(lora, base, {"record": Counter()}, {"world_size": 1})
    settings = CheckpointConfig(**{"every": 2, "keep_best": 1} | config)
    return CheckpointManager(trainer, contents, store, settings, SINGLE_PROCESS, trainer.preemption)


def train(manager: CheckpointManager, trainer: Trainer) -> list[float]:
    losses = []
    for step in trainer.run(manager.roll_back):
        losses.append(step.loss)
        manager.after_step(None, stop_requested=trainer.stop_requested)
    manager.wait_for_write()
    return losses


def full_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    def write(folder: Path, *rest: Any) -> None:
        if int(folder.name.removeprefix("step-")) in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_checkpoint(folder, *rest)

    monkeypatch.setattr("hqqtrain.checkpoint.manager.write_checkpoint", write)


def test_a_resumed_training_repeats_the_uninterrupted_one(store: CheckpointStore):
    whole = make_trainer()
    with make_manager(whole, store) as manager:
        manager.resume(None)
        losses = train(manager, whole)
    assert store.steps() == [4, 6]
    checkpoint = store.newest_intact()
    assert checkpoint is not None
    assert json.loads((checkpoint.folder / "state.json").read_text()).keys() == {
        "format", "step", "trained", "updates", "scaler", "record", "world_size", "eval_loss",
        "time",
    }  # fmt: skip
    assert checkpoint.state["record"] == {"calls": 3}
    (store.folder(6) / "state.json").unlink()  # so that the one before it is resumed
    found, resumed = store.newest_intact(), make_trainer()
    assert found is not None
    with torch.no_grad():  # the model gets its parameters when it is loaded
        for name, tensor in found.parameters().items():
            resumed.trainable_parameters[name].copy_(tensor)
    with make_manager(resumed, store) as manager:
        manager.resume(found)
        assert train(manager, resumed) == losses[4:]
    theirs = saved_state(whole)["tensors"]
    ours = saved_state(resumed)["tensors"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_checkpoints_that_may_be_the_best_are_saved_and_kept(store: CheckpointStore):
    trainer = make_trainer()
    with make_manager(trainer, store) as manager:
        for step in trainer.run(manager.roll_back):
            measured = {1: 3.0, 3: 2.0, 5: 4.0}.get(step.number)
            manager.after_step(measured, stop_requested=False)
        manager.wait_for_write()
    assert store.steps() == [3, 5, 6]


def test_a_request_to_stop_saves_and_stops(store: CheckpointStore):
    trainer = make_trainer()
    with make_manager(trainer, store, every=None) as manager:
        trainer.step()
        manager.after_step(None, stop_requested=False)
        assert store.steps() == []
        with pytest.raises(PreemptedError):
            manager.after_step(None, stop_requested=True)
    assert store.steps() == [1]


def test_a_stop_between_steps_saves_the_last_one_once(store: CheckpointStore):
    trainer = make_trainer()
    with make_manager(trainer, store, every=None) as manager:
        manager.save_before_stop(None)
        assert store.steps() == []  # there is nothing to restore before the first step
        trainer.step()
        manager.save_before_stop(1.5)
        manager.save_before_stop(None)
    checkpoint = store.newest_intact()
    assert checkpoint is not None
    assert (store.steps(), checkpoint.state["eval_loss"]) == ([1], 1.5)


def test_rolling_back_restores_parameters_optimizer_and_counters(store: CheckpointStore):
    trainer = make_trainer("rollback")
    poison(trainer, 3)
    with make_manager(trainer, store) as manager:
        manager.resume(None)
        assert store.steps() == [] or store.steps() == [0]  # written in the background
        losses = train(manager, trainer)
    assert len(losses) == 1 + STEPS  # the third step was lost
    assert (trainer.state.steps, trainer.state.skipped) == (STEPS, 2)
    alone = make_trainer("skip")
    poison(alone, 2, 3)
    kept = [step.loss for step in alone.run(lambda: None)]
    assert losses[:2] + losses[3:] == kept


def test_a_full_disk_does_not_end_the_training(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    full_at(monkeypatch, 4)
    trainer = make_trainer()
    with caplog.at_level(logging.ERROR), make_manager(trainer, store) as manager:
        assert len(train(manager, trainer)) == STEPS
    assert "the checkpoint of step 4 was not written" in caplog.text
    assert store.steps() == [2, 6]


def test_a_full_disk_is_an_error_where_the_checkpoint_is_needed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    full_at(monkeypatch, 1)
    trainer = make_trainer()
    with make_manager(trainer, store) as manager:
        trainer.step()
        with pytest.raises(UserError, match="the checkpoint of step 1 was not written"):
            manager.after_step(None, stop_requested=True)
