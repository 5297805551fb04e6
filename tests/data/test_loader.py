"""The loader: ranks share a global batch without overlap, in micro-batches of limited size."""

import numpy as np
import pytest
import torch

from hqqtrain.config.groups import TrainConfig
from hqqtrain.data.loader import PackedLoader
from hqqtrain.data.sequences import IGNORE_INDEX, TokenSequences, plain_text_targets

LENGTHS = np.array([5, 9, 2, 7, 3, 8, 6, 4, 11, 10])


def make_sequences() -> TokenSequences:
    """One text for each sequence; its tokens are all equal to the number of the sequence."""
    end = LENGTHS.cumsum()
    starts = end - LENGTHS
    stream = np.repeat(np.arange(len(LENGTHS), dtype=np.int32), LENGTHS)
    return TokenSequences(stream, plain_text_targets(stream, starts), starts, starts, end)


def make_loader(rank: int = 0, world_size: int = 1, **train: object) -> PackedLoader:
    config = TrainConfig(**{"global_batch_size": 6, "micro_batch_size": 2, "seed": 3} | train)
    return PackedLoader(make_sequences(), config, rank=rank, world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_global_batch(world_size: int):
    for index in range(4):
        found, targets = [], 0
        for rank in range(world_size):
            batches = list(make_loader(rank, world_size).batches(index))
            own = 6 // world_size
            assert [len(batch["labels"]) for batch in batches] == [2] * (own // 2) + [1] * (own % 2)
            found += [int(row[0]) for batch in batches for row in batch["input_ids"]]
            targets += sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
        assert sorted(found) == sorted(make_loader().describe(index)["samples"])
        assert targets == make_loader().target_token_count(index)
        samples = make_loader().describe(index)["samples"]
        assert make_loader().token_count(index) == sum(LENGTHS[samples])


def test_a_batch_is_padded_and_can_be_described():
    loader = make_loader(micro_batch_size=6)
    (batch,), facts = loader.batches(1), loader.describe(1)
    assert batch["input_ids"].shape == (6, max(LENGTHS[facts["samples"]]))
    for row, labels, tokens in zip(
        batch["input_ids"], batch["labels"], facts["tokens"], strict=True
    ):
        assert row[: len(tokens)].tolist() == tokens
        assert labels.tolist() == [IGNORE_INDEX, *tokens[1:]] + [IGNORE_INDEX] * (
            len(row) - len(tokens)
        )


def test_steps_and_epochs():
    assert make_loader(max_steps=None, epochs=2).total_steps == 4  # 20 sequences, 6 a step
    assert make_loader(max_steps=7).total_steps == 7
    assert make_loader(max_steps=0).total_steps == 0
    assert make_loader().epoch(5) == 3.0


def test_a_new_loader_gives_the_same_batches():
    """Nothing but the index of the batch is needed to resume."""
    first, second = make_loader(), make_loader()
    list(first.batches(0))
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(first.batches(9), second.batches(9), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
