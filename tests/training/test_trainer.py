"""The trainer on a tiny model in one process: its steps, its state, and batches it leaves out."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_trainer import STEPS, make_trainer, poison, saved_state
from torch.utils._python_dispatch import TorchDispatchMode

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.training.trainer import Trainer, seed_dropout


def run(trainer: Trainer, roll_back: Callable[[], object] = lambda: None) -> list[float]:
    return [step.loss for step in trainer.run(roll_back)]


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
    torch.optim.AdamW(parameters, lr=0.025, weight_decay=0.0).step()
    assert (result.number, result.batch_index, result.tokens) == (1, 0, tokens)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert result.learning_rate == 0.025  # the first of two warm-up steps
    assert result.peak_memory_gib > 0
    for name, ours in trainer.trainable_parameters.items():
        torch.testing.assert_close(ours, alone.trainable_parameters[name], rtol=1e-3, atol=1e-5)


def test_the_peak_memory_of_a_step_is_that_up_to_its_backward_pass(monkeypatch: pytest.MonkeyPatch):
    """The memory of the first optimizer step counts from the second step on."""
    trainer = make_trainer()
    monkeypatch.setattr(
        "hqqtrain.training.trainer.peak_memory_bytes",
        lambda _: (trainer.engine.step_count + 1) * 2**30,
    )
    assert [step.peak_memory_gib for step in trainer.run(lambda: None)] == [1, 2, 3, 4, 5, 6]


def test_training_lowers_the_loss_and_counts():
    assert run(make_trainer(max_steps=30))[-1] < 3.4  # log(32) = 3.47 at first
    trainer = make_trainer()
    losses = run(trainer)
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


class HostReads(TorchDispatchMode):
    """Counts the values that Python reads from tensors, for which it would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers not look for the texts of a row, as it does not with `varlen_attention`."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None)


@pytest.mark.usefixtures("without_search")
def test_a_step_reads_no_value_of_a_tensor_but_its_result():
    trainer = make_trainer()
    with HostReads() as reads:
        result = trainer.step()  # reads all at once, by `tolist`
    assert result.was_taken
    assert reads.count == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("without_search")
def test_a_step_waits_for_the_gpu_once():
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = make_trainer(comm=Communicator(0, 1, device))
    trainer.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert trainer.step().was_taken
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, waits


def test_the_seed_of_dropout_is_fixed():
    """A resumed run of another version must drop the same activations."""
    seed_dropout(0, 3, 1)
    assert torch.initial_seed() == 2236338143322339785
