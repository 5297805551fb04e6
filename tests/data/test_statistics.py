"""The figures of data equal those that loops over single tokens count."""

import random
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest

from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.statistics import (
    count_duplicates,
    count_parts,
    example_ends,
    histogram,
    measure_data,
    token_masks,
)


def _data(texts: list[list[int]], targets: list[list[bool]], bounds: list[tuple[int, int]]):
    lengths = np.array([len(text) for text in texts], np.int64)
    begin, end = np.array(bounds, np.int64).reshape(-1, 2).T
    return TokenSequences(
        np.array([*chain(*texts)], np.int32), np.array([*chain(*targets)], bool),
        np.cumsum(lengths) - lengths, begin, end,
    )  # fmt: skip


def _random_data(seed: int) -> TokenSequences:
    """Return a few short texts, in sequences that leave random tokens out."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 9) for _ in range(draw.randint(1, 9))]
    texts = [[draw.randrange(3) for _ in range(size)] for size in sizes]
    targets = [[draw.random() < 0.4 for _ in text] for text in texts]
    total, position, bounds = sum(map(len, texts)), 0, []
    while position + 2 <= total:
        begin = position + draw.choice([0, 0, 0, draw.randrange(4)])
        position = min(total, begin + draw.randint(2, 7))
        if position - begin > 1:
            bounds.append((begin, position))
    draw.shuffle(bounds)  # packing may order sequences in any way
    return _data(texts, targets, bounds or [(0, total)])


@pytest.mark.parametrize("seed", range(60))
def test_the_figures_are_those_of_a_count_of_single_tokens(seed):
    data = _random_data(seed)
    bounds = list(zip(data.begin.tolist(), data.end.tolist(), strict=True))
    texts = list(zip(data.starts.tolist(), example_ends(data).tolist(), strict=True))
    covered = {i for begin, end in bounds for i in range(begin, end)}
    trained = {i for begin, end in bounds for i in range(begin + 1, end) if data.targets[i]}
    pieces = [sum(b < end and start < e for b, e in bounds) for start, end in texts]
    contents = Counter(tuple(data.stream[start:end].tolist()) for start, end in texts)
    found = measure_data(data, data, max_seq_len=8)
    assert found.examples == len(texts)
    assert found.tokens == len(covered)
    assert found.trained_tokens == len(trained) == data.target_token_count
    assert found.sequences == len(bounds)
    assert found.padding == pytest.approx(1 - len(covered) / (8 * len(bounds)))
    lost = [len(covered.intersection(range(*text))) - (text[1] - text[0]) for text in texts]
    dropped = sum(covered.isdisjoint(range(*text)) for text in texts)
    assert found.dropped == dropped
    assert found.truncated == sum(number < 0 for number in lost) - dropped
    assert found.split == sum(number > 1 for number in pieces)
    assert found.untrained == sum(trained.isdisjoint(range(*text)) for text in texts)
    assert found.duplicates == sum(number - 1 for number in contents.values())
    assert count_parts(data).tolist() == pieces
    lengths = sorted(end - start for start, end in texts)
    assert (found.lengths["min"], found.lengths["max"]) == (lengths[0], lengths[-1])
    p95 = found.lengths["p95"]
    assert sum(length <= p95 for length in lengths) >= 0.95 * len(lengths)
    assert sum(length < p95 for length in lengths) < 0.95 * len(lengths)
    assert found.lengths["median"] == lengths[(len(lengths) - 1) // 2]


def test_the_masks_are_those_of_the_labels():
    data = _random_data(7)
    covered, trained = token_masks(data, 0, len(data.stream))
    for index in range(len(data)):
        place = slice(int(data.begin[index]), int(data.end[index]))
        assert covered[place].all()
        assert trained[place].tolist() == (data[index]["labels"] != -100).tolist()


def test_texts_are_equal_only_as_a_whole():
    texts = [[1, 2], [1], [2, 1, 2], [1, 2], [1, 2]]
    data = _data(texts, [[True] * len(text) for text in texts], [(0, 11)])
    assert count_duplicates(data) == 2


@pytest.mark.parametrize("seed", range(80))
def test_every_value_is_in_one_bar(seed):
    draw = random.Random(seed)
    low, spread = draw.choice([0, 1, 2, 7, 900, 10**6]), draw.choice([0, 1, 5, 30, 10**4, 10**8])
    values = np.array([low + draw.randint(0, spread) for _ in range(draw.randint(1, 40))], np.int64)
    bars = histogram(values)
    assert 1 <= len(bars) <= 12
    assert all(one[1] + 1 == other[0] for one, other in pairwise(bars))
    for begin, end, number in bars:
        assert begin <= end
        assert number == sum(begin <= value <= end for value in values)
    assert sum(number for _, _, number in bars) == len(values)
    assert 0 not in (bars[0][2], bars[-1][2])  # no bar is empty at either end


def test_bars_have_equal_widths_or_equal_ratios():
    assert histogram(np.array([12, 18, 25])) == [[12, 13, 1], [14, 15, 0], [16, 17, 0], [18, 19, 1],
                                                 [20, 21, 0], [22, 23, 0], [24, 25, 1]]  # fmt: skip
    assert histogram(np.array([3, 5, 40])) == [[2, 3, 1], [4, 7, 1], [8, 15, 0], [16, 31, 0],
                                               [32, 63, 1]]  # fmt: skip
    assert [bar[:2] for bar in histogram(np.array([1, 10**6]), 8)][-1] == [262144, 2097151]
