"""Pack examples of different lengths into sequences with little padding, without cutting them."""

from array import array

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Distribute items over bins, by best-fit decreasing.

    From the longest to the shortest, each item goes into the fullest bin that has room for it. The
    result needs at most 11/9 of the fewest bins, and 4 more (Johnson 1973). Every step takes the
    time to look at `capacity` bits.

    Args:
        lengths: int64 [n], each from 1 to `capacity`.
        capacity: Largest sum of the lengths in a bin.

    Returns:
        The items, bin after bin, int64 [n], and the position after the last item of each bin,
        int64 [bins]. The items of a bin ascend, and the bins ascend by their first item.
    """
    bin_of_item = np.empty(len(lengths), np.int64)
    by_room = [array("q") for _ in range(capacity + 1)]  # the bins with so much room
    rooms = 0  # bit r is set if there is a bin with room for exactly r
    bins = 0
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            number, room = bins, capacity
            bins += 1
        bin_of_item[item] = number
        if room > length:  # a full bin gets no more items
            by_room[room - length].append(number)
            rooms |= 1 << (room - length)
    return _grouped(bin_of_item, bins)


def _grouped(bin_of_item: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the items by bin, and where each bin ends; see `best_fit`."""
    by_bin = np.argsort(bin_of_item, kind="stable")
    sizes = np.bincount(bin_of_item, minlength=bins)
    first_items = by_bin[np.cumsum(sizes) - sizes]
    order = np.argsort(first_items, kind="stable")
    rank_of_bin = np.empty(bins, np.int64)
    rank_of_bin[order] = np.arange(bins)
    items = np.argsort(rank_of_bin[bin_of_item], kind="stable")
    return items, np.cumsum(sizes[order])
