"""Progress of a training: steps that were taken and batches that were left out."""

from dataclasses import asdict

from hqqtrain.training.state import StepResult, TrainState


def _step(number: int, batch_index: int, loss: float) -> StepResult:
    return StepResult(number, batch_index, 100, loss, seconds=0.5)


def test_steps_are_added():
    state = TrainState()
    for index in range(3):
        state.add(_step(index + 1, index, 2.0 - index))
    assert state == TrainState(steps=3, tokens=300, seconds=1.5, loss=0.0)
    assert state.next_batch_index == 3


def test_batches_that_were_left_out_move_the_position_in_the_data():
    state = TrainState(steps=3)
    state.skip_to(5)  # batches 3 and 4
    assert (state.skipped, state.next_batch_index) == (2, 5)
    state.add(_step(4, 5, 1.0))
    assert (state.steps, state.next_batch_index) == (4, 6)
    state.skip_to(7)
    assert (state.skipped, state.next_batch_index) == (3, 7)


def test_a_checkpoint_restores_all_of_it():
    state = TrainState(steps=2, tokens=9, seconds=0.5, loss=1.25, skipped=3)
    assert TrainState(**asdict(state)) == state
