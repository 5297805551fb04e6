"""The sample order: a pure function, every sample once per epoch, stable across releases."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqqtrain.data.order import SampleOrder

sizes = st.integers(1, 40)


@given(n=sizes, batch=sizes, seed=st.integers(0, 2**40))
def test_every_epoch_contains_every_sample_once(n, batch, seed):
    order = SampleOrder(n, seed)
    steps = order.steps(2, batch)
    seen = [i for step in range(steps) for i in order.indices(step, batch)]
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == list(range(n))


@given(n=sizes, seed=st.integers(0, 9))
def test_the_sequence_of_samples_does_not_depend_on_the_batch_size(n, seed):
    order = SampleOrder(n, seed)
    small = [i for step in range(12) for i in order.indices(step, 2)]
    assert small == [i for step in range(3) for i in SampleOrder(n, seed).indices(step, 8)]


def test_epochs_and_seeds_differ():
    order = SampleOrder(1000, 0)
    assert order.indices(0, 1000) != order.indices(1, 1000)
    assert order.indices(0, 1000) != SampleOrder(1000, 1).indices(0, 1000)
    assert order.epoch(3, 500) == 1.5
    assert order.steps(0.01, 500) == 1


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps"),
    [(0, 10, 2, 0), (0.0, 1, 1, 0), (1.1, 10, 1, 11), (1.1, 100, 10, 11), (0.1, 30, 3, 1),
     (2.3, 100, 10, 23), (1.15, 100, 1, 115), (1.11, 10, 1, 12), (1e-9, 10, 1, 1),
     (1_000_000, 10, 2, 5_000_000)],
)  # fmt: skip
def test_steps_cover_the_epochs_as_they_are_written(epochs, samples, batch, steps):
    assert SampleOrder(samples, 0).steps(epochs, batch) == steps


def test_golden_order():
    """Another numpy must give a resumed run the same order.

    The golden order is that of RandomState(MT19937(SeedSequence((7, 0)))).
    """
    assert SampleOrder(10, 7).indices(0, 10) == [4, 5, 9, 8, 1, 7, 6, 0, 2, 3]
