"""Best-fit packing: all items once, no bin too full, close to the fewest bins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqqtrain.data.best_fit import best_fit


def _bins(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return the items of each bin."""
    items, ends = best_fit(lengths, capacity)
    return [part.tolist() for part in np.split(items, ends)[:-1]]


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_item_is_in_one_bin_that_is_not_too_full(lengths: list[int]):
    bins = _bins(np.array(lengths, np.int64), 20)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in items) for items in bins]
    assert all(0 < total <= 20 for total in sums)
    assert bins == sorted(bins)
    fewest = -(-sum(lengths) // 20)
    assert len(bins) <= 11 / 9 * max(fewest, sum(length > 10 for length in lengths)) + 4


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([5], [[0]]),
        ([10, 10], [[0], [1]]),
        ([3, 7, 6, 4], [[0, 1], [2, 3]]),
        ([6, 3, 1, 7], [[0, 2], [1, 3]]),  # 3 fits beside both 6 and 7
    ],
)
def test_an_item_goes_into_the_fullest_bin_that_has_room(lengths, expected):
    assert _bins(np.array(lengths, np.int64), 10) == expected


def test_a_hundred_thousand_items_have_little_padding():
    lengths = np.random.RandomState(0).randint(1, 513, 100_000).astype(np.int64)
    bins = _bins(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.999
