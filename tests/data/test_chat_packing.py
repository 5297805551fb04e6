"""Trained tokens survive packing, truncation at every length, splitting and batches."""

import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, TrainConfig
from hqqtrain.data.encoding import encode_examples
from hqqtrain.data.examples import Conversation
from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.loader import PackedLoader
from hqqtrain.data.packing import pack_examples
from hqqtrain.data.sequences import IGNORE_INDEX, TokenSequences
from hqqtrain.models.source import TINY_FOLDER

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids and labels."""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_FOLDER)


def chats(count: int) -> list[Conversation]:
    """Return conversations of different lengths, none of which equals another."""
    rng = random.Random(0)
    found = []
    for number in range(count):
        messages = [{"role": "system", "content": f"Number {number}."}] * rng.randint(0, 1)
        for turn in range(rng.randint(1, 3)):
            question = "why " * rng.randint(1, 12) + f"{number} {turn}?"
            answer = "because " * rng.randint(1, 9) + f"of {number * turn}."
            messages += [{"role": "user", "content": question}]
            messages += [{"role": "assistant", "content": answer}]
        found.append(Conversation(tuple(messages)))
    return found


def pack(examples, tokenizer, length: int, *, packing=True, **data) -> TokenSequences:
    config = DataConfig(chat_template="chatml", **data)
    return pack_examples(
        examples, tokenizer, max_seq_len=length, packing=packing, data=config
    ).sequences


def encoded(examples, tokenizer) -> list[Row]:
    """Return the tokens of each example, and its labels."""
    pairs = encode_examples(examples, tokenizer, DataConfig(chat_template="chatml"))
    return [
        (tuple(ids.tolist()), tuple(np.where(targets, ids, IGNORE_INDEX).tolist()))
        for ids, targets in pairs
    ]


def rows(sequences: TokenSequences) -> list[Row]:
    """Return the tokens and labels of each text of each sequence, as the model gets them."""
    found = []
    for sequence in sequences:
        ids, labels, positions = (
            sequence[name].tolist() for name in ("input_ids", "labels", "position_ids")
        )
        starts = [i for i, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:end] == list(range(end - start))
            found.append((tuple(ids[start:end]), tuple(labels[start:end])))
    return found


def test_packing_keeps_every_chat_whole(tokenizer):
    examples = chats(200)
    whole = encoded(examples, tokenizer)
    longest = max(len(ids) for ids, _ in whole)
    for length in (longest, 2 * longest, 1000):
        sequences = pack(examples, tokenizer, length)
        assert sorted(rows(sequences)) == sorted(whole)
        assert (sequences.end - sequences.begin).max() <= length
        assert sequences.target_token_count == sum(
            label != IGNORE_INDEX for _, labels in whole for label in labels
        )
    assert (sequences.end - sequences.begin).mean() > 0.9 * 1000


def test_dropping_all_examples_is_said(tokenizer):
    with pytest.raises(UserError, match=r"data\.on_long=drop leaves out longer .* than 8 tokens"):
        pack(chats(3), tokenizer, 8, on_long="drop")


@pytest.mark.parametrize("packing", [True, False])
def test_truncation_at_every_length_keeps_the_labels_before_it(tokenizer, packing: bool):
    examples = chats(3)
    whole = encoded(examples, tokenizer)
    for length in range(8, max(len(ids) for ids, _ in whole) + 2):
        expected = [(ids[:length], labels[:length]) for ids, labels in whole]
        expected = [row for row in expected if set(row[1]) != {IGNORE_INDEX}]
        if not expected:
            with pytest.raises(
                UserError, match=rf"trained token among its first {length} \(train.max_seq_len\)"
            ):
                pack(examples, tokenizer, length, packing=packing)
        else:
            got = rows(pack(examples, tokenizer, length, packing=packing))
            assert sorted(got) == sorted(expected)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("length", [5, 16, 31])
def test_split_has_every_label_but_that_of_the_first_token_of_a_piece(tokenizer, packing, length):
    examples = chats(5)
    expected = []
    for ids, labels in encoded(examples, tokenizer):
        for begin in range(0, len(ids), length):
            piece = (IGNORE_INDEX, *labels[begin + 1 : begin + length])
            if set(piece) != {IGNORE_INDEX}:
                expected.append((ids[begin : begin + length], piece))
    got = rows(pack(examples, tokenizer, length, packing=packing, on_long="split"))
    assert sorted(got) == sorted(expected)


def test_long_chats_are_dropped_or_an_error(tokenizer):
    examples = chats(40)
    whole = encoded(examples, tokenizer)
    length = int(np.median([len(ids) for ids, _ in whole]))
    kept = [row for row in whole if len(row[0]) <= length]
    assert 0 < len(kept) < 40
    assert sorted(rows(pack(examples, tokenizer, length, on_long="drop"))) == sorted(kept)
    number = next(i for i, (ids, _) in enumerate(whole, start=1) if len(ids) > length)
    with pytest.raises(UserError, match=rf"example {number} has .*so have {40 - len(kept)} of 40"):
        pack(examples, tokenizer, length, on_long="error")


@pytest.mark.parametrize("packs", [True, False])
def test_two_epochs_on_two_ranks_have_every_chat_twice(tokenizer, packs: bool):
    examples = chats(60)
    sequences = pack(examples, tokenizer, 256)
    config = TrainConfig(
        max_steps=1, global_batch_size=2 * len(sequences), micro_batch_size=2, max_seq_len=256
    )
    seen: list[Row] = []
    for rank in range(2):
        loader = PackedLoader(
            sequences, config, rank=rank, world_size=2, layout=BatchLayout(packs=packs)
        )
        for batch in loader.batches(0):
            seen += _texts_of_batch(batch)
    expected = [_until_last_label(row) for row in encoded(examples, tokenizer)]
    assert sorted(seen) == sorted(2 * expected)


def _texts_of_batch(batch) -> list[Row]:
    """Return the texts of a batch that have labels; repeated rows and padding have none."""
    found = []
    for ids, labels, positions in zip(
        batch["input_ids"].tolist(),
        batch["labels"].tolist(),
        batch.get("position_ids", batch["labels"]).tolist(),
        strict=True,
    ):
        starts = [i for i, position in enumerate(positions) if position == 0]
        starts = starts if "position_ids" in batch else [0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if set(labels[start:end]) != {IGNORE_INDEX}:
                found.append(_until_last_label((tuple(ids[start:end]), tuple(labels[start:end]))))
    return found


def _until_last_label(row: Row) -> Row:
    last = max(i for i, label in enumerate(row[1]) if label != IGNORE_INDEX)
    return row[0][: last + 1], row[1][: last + 1]


@pytest.mark.parametrize("text_is_first", [True, False])
def test_chats_beside_plain_text_are_packed_as_a_whole(tokenizer, text_is_first):
    texts = [f"a plain text of number {number}" for number in range(9)]
    examples = [*texts, *chats(9)] if text_is_first else [*chats(9), *texts]
    length = max(len(ids) for ids, _ in encoded(examples, tokenizer))
    packed = pack(examples, tokenizer, length)
    assert sorted(rows(packed)) == sorted(encoded(examples, tokenizer))
