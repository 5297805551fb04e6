"""Pack examples of different lengths into sequences with little padding, without cutting them."""

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Distribute items over bins, by best-fit decreasing.

    From the longest to the shortest, each item goes into the fullest bin that has room for it. The
    result needs at most 11/9 of the fewest bins, and 4 more (Johnson 1973). Every step takes the
    time to look at `capacity` bits.

    Args:
        lengths: int64 [n], each from 1 to `capacity`.
        capacity: Largest sum of the lengths in a bin.

    Returns:
        The indices of the items of each bin, ascending; bins ascend by their first item.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # the bins with so much room
    rooms = 0  # bit r is set if there is a bin with room for exactly r
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            number, room = len(bins), capacity
            bins.append([])
        bins[number].append(item)
        by_room[room - length].append(number)
        rooms |= 1 << (room - length)
    return sorted(sorted(items) for items in bins)
