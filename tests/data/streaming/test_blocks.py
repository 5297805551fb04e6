"""Blocks of a stream: the sequences of training without streaming, and bounded memory."""

import json
import tracemalloc
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
from forkserver import fork_context

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig, TrainConfig
from hqqtrain.data import encoding_pool
from hqqtrain.data.packing import pack_examples
from hqqtrain.data.sequences import TokenSequences, concatenate
from hqqtrain.data.sources import load_training_texts
from hqqtrain.data.streaming.blocks import Block, BlockState, BlockStream
from hqqtrain.data.streaming.examples import ExampleStream, StreamPart, StreamSource
from hqqtrain.data.streaming.sources import open_training_stream
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer

LENGTH = 24
NO_EVAL = EvalConfig(source=None)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_FOLDER)


@pytest.fixture(params=["text", "chat"])
def source(request, tmp_path: Path) -> str:
    """Return a file of rows of different lengths, some longer than a sequence."""
    rows: list[dict] = [{"text": f"row {i} " * (1 + i % 9)} for i in range(60)]
    if request.param == "chat":
        rows = [
            {"prompt": f"What is {i}? " * (1 + i % 4), "completion": "It is " + "I " * (i % 7)}
            for i in range(60)
        ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def blocks_of(tokenizer, data: DataConfig, state: BlockState | None = None, **train) -> Iterator:
    config = TrainConfig(**{"max_seq_len": LENGTH, "seed": 3} | train)
    return BlockStream(open_training_stream(data, NO_EVAL), tokenizer, config, data).read(state)


def content(sequences: TokenSequences) -> list[tuple]:
    return [
        tuple(map(tuple, (each["input_ids"].tolist(), each["labels"].tolist(),
                          each["position_ids"].tolist())))
        for each in sequences
    ]  # fmt: skip


def one_pass(blocks: Iterator[Block]) -> list[tuple]:
    found: list[tuple] = []
    for block in blocks:
        if block.passes:
            return found
        found += content(block.sequences)
    raise AssertionError


@pytest.mark.parametrize("packing", [True, False])
def test_a_pass_in_one_block_has_the_sequences_of_training_without_streaming(
    tokenizer, source, packing
):
    data = DataConfig(source=source, streaming=True, shuffle_buffer=0)
    expected = pack_examples(
        load_training_texts(data, NO_EVAL), tokenizer, max_seq_len=LENGTH, packing=packing
    ).sequences
    assert one_pass(blocks_of(tokenizer, data, packing=packing)) == content(expected)
    assert len(expected) > 30


@pytest.mark.parametrize("buffer", [1, 4, 15])
def test_blocks_have_the_same_tokens(tokenizer, source, buffer):
    """Plain text is the same stream in the same order; others are packed in other company."""
    data = DataConfig(source=source, streaming=True, shuffle_buffer=buffer)
    expected = content(
        pack_examples(load_training_texts(data, NO_EVAL), tokenizer, max_seq_len=LENGTH).sequences
    )
    found = one_pass(blocks_of(tokenizer, data))
    assert len(found) >= len(expected)
    if "prompt" not in Path(source).read_text():
        assert sorted(found) == sorted(expected)

    def trained(sequences: list[tuple]) -> list[int]:
        return sorted(label for _, labels, _ in sequences for label in labels if label >= 0)

    assert trained(found) == trained(expected)


def test_every_pass_is_shuffled_anew(tokenizer, source):
    blocks = islice(blocks_of(tokenizer, DataConfig(source=source, shuffle_buffer=500)), 2)
    first, second = (content(block.sequences) for block in blocks)
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize(("buffer", "number"), [(0, 4), (5, 14)])
def test_blocks_continue_from_every_state(tokenizer, source, buffer, number):
    data = DataConfig(source=source, shuffle_buffer=buffer)
    blocks = list(islice(blocks_of(tokenizer, data), number))
    assert blocks[-1].passes > 0
    for index, block in enumerate(blocks):
        state = BlockState.from_json(json.loads(json.dumps(block.state.to_json())))
        rest = list(islice(blocks_of(tokenizer, data, state), min(2, number - index)))
        for ours, theirs in zip(rest, blocks[index : index + 2], strict=True):
            assert ours.sequences.digest == theirs.sequences.digest
            assert ours.state.to_json() == theirs.state.to_json()
            assert ours.passes == theirs.passes


def test_the_memory_of_a_source_without_end_is_constant(tokenizer):
    class Endless:
        def __iter__(self):
            return (f"row {number} " * 40 for number in count())

    stream = ExampleStream([StreamSource("data.source=endless", [StreamPart(Endless())])])
    train = TrainConfig(max_seq_len=64)
    blocks = BlockStream(stream, tokenizer, train, DataConfig(shuffle_buffer=50)).read()
    tracemalloc.start()
    peaks = []
    for _ in range(3):
        tracemalloc.reset_peak()
        assert all(45 <= len(block.sequences) <= 60 for block in islice(blocks, 10))
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1]
    assert peaks[2] < 5e6


def test_what_is_not_trained_is_an_error(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    row = {"prompt": "a long prompt " * 40, "completion": "x"}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match="none of its examples has a trained token"):
        list(blocks_of(tokenizer, DataConfig(source=str(file))))
    data = DataConfig(source=str(file), on_long="error")
    with pytest.raises(UserError, match=r"example 1 has \d+ tokens"):
        list(blocks_of(tokenizer, data))


def test_a_token_that_the_model_does_not_have_is_an_error(tokenizer, source):
    data = DataConfig(source=source)
    stream = open_training_stream(data, NO_EVAL)
    with pytest.raises(UserError, match="only 20 embeddings"):
        next(BlockStream(stream, tokenizer, TrainConfig(), data, vocab_size=20).read())


def test_sequences_are_concatenated_without_the_rest_of_their_stream(tokenizer, source):
    block = next(blocks_of(tokenizer, DataConfig(source=source, shuffle_buffer=8)))
    picked = [block.sequences.select([i]) for i in (3, 1)] + [block.sequences.select([0, 2])]
    joined = concatenate(picked)
    assert content(joined) == [content(block.sequences)[i] for i in (3, 1, 0, 2)]
    assert len(joined.stream) == np.sum(joined.end - joined.begin)
    assert content(joined.split_texts()) == [
        each for part in picked for each in content(part.split_texts())
    ]


def chats_of(tmp_path: Path, rows: int, refused: set[int]) -> str:
    """Write chats, some of which the template chatml of the library refuses."""
    lines = []
    for number in range(rows):
        role = "tool" if number in refused else "user"
        messages = [{"role": role, "content": f"What is {number}?"}]
        messages += [{"role": "assistant", "content": f"It is {number}."}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    return str(tmp_path / "chat.jsonl")


def test_chats_that_the_template_refuses_count_as_bad_rows_of_a_pass(tokenizer, tmp_path, caplog):
    file = chats_of(tmp_path, 12, {0, 5, 11})
    settings = {"source": file, "chat_template": "gemma", "shuffle_buffer": 3}
    data = DataConfig(**settings, max_bad_rows=3)
    blocks = list(islice(blocks_of(tokenizer, data, max_seq_len=64), 12))
    assert blocks[-1].passes > 1
    assert caplog.text.count("chat.jsonl, line 6: ") == blocks[-1].passes + 1
    assert max(len(block.state.refused) for block in blocks) >= 2
    for index, block in enumerate(blocks[:-1]):
        state = BlockState.from_json(block.state.to_json())
        (same, after) = islice(blocks_of(tokenizer, data, state, max_seq_len=64), 2)
        assert same.digest == block.digest
        assert after.state.to_json() == blocks[index + 1].state.to_json()
    trained = {label for block in blocks for each in block.sequences for label in
               each["labels"].tolist() if label >= 0}  # fmt: skip
    assert trained
    few = DataConfig(**settings, max_bad_rows=2)
    with pytest.raises(UserError, match=r"line 12: .* Set data\.max_bad_rows above 2"):
        list(blocks_of(tokenizer, few, max_seq_len=64))


@pytest.mark.parametrize("keys", [({"repeats": 3}, {}), ({"weight": 3}, {"weight": 1})])
def test_a_chat_that_is_used_several_times_in_a_pass_is_one_bad_row(tokenizer, tmp_path, keys):
    """Whether or not the run was resumed between its uses."""
    odd, more = (tmp_path / name for name in ("odd", "more"))
    for folder in (odd, more):
        folder.mkdir()
    files = chats_of(odd, 3, {1}), chats_of(more, 20, set())
    source = [{"path": file, **each} for file, each in zip(files, keys, strict=True)]
    data = DataConfig(
        source=source, chat_template="gemma", shuffle_buffer=1, max_bad_rows=1, streaming=True
    )
    blocks = list(islice(blocks_of(tokenizer, data, max_seq_len=64), 30))
    states = [block.state.to_json() for block in blocks]
    assert max(len(block.state.refused) for block in blocks) == 1
    for index in (5, 9, 14):
        state = BlockState.from_json(json.loads(json.dumps(states[index])))
        resumed = islice(blocks_of(tokenizer, data, state, max_seq_len=64), 8)
        assert [block.state.to_json() for block in resumed] == states[index : index + 8]


def test_several_processes_give_the_blocks_of_one(tokenizer, tmp_path, monkeypatch, caplog):
    """They read ahead, beyond the end of a pass, but states and warnings are the same."""
    monkeypatch.setattr(encoding_pool, "SERIAL_CHARACTERS", 100)
    monkeypatch.setattr(encoding_pool, "BATCH_EXAMPLES", 3)
    monkeypatch.setattr(encoding_pool, "start_method", fork_context)
    file = chats_of(tmp_path, 14, {0, 5, 11})
    settings = {"chat_template": "gemma", "shuffle_buffer": 3, "max_bad_rows": 3}
    found = []
    for workers in (1, 2):
        data = DataConfig(source=file, workers=workers, **settings)
        blocks = list(islice(blocks_of(tokenizer, data, max_seq_len=64), 12))
        resumed = blocks_of(tokenizer, data, blocks[4].state, max_seq_len=64)
        blocks += islice(resumed, 3)
        found.append([
            [(block.digest, block.state.to_json(), block.passes) for block in blocks],
            [line for line in caplog.messages if line.startswith("left out")],
        ])  # fmt: skip
        caplog.clear()
    assert found[0] == found[1]
    assert blocks[11].passes > 2
    few = DataConfig(source=file, workers=2, **settings | {"max_bad_rows": 2})
    with pytest.raises(UserError, match=r"line 12: .* Set data\.max_bad_rows above 2"):
        list(blocks_of(tokenizer, few, max_seq_len=64))


@pytest.mark.parametrize(("on_long", "done"), [("auto", "truncated"), ("drop", "left out")])
def test_the_first_examples_that_are_too_long_are_reported(
    tokenizer, tmp_path, caplog, on_long, done
):
    rows = [{"prompt": "What? " * number, "completion": "That."} for number in (1, 30, 2, 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(source=str(tmp_path / "rows.jsonl"), on_long=on_long)
    list(islice(blocks_of(tokenizer, data), 3))
    (message,) = [line for line in caplog.messages if "that were read together" in line]
    assert "2 of 4 examples" in message
    assert f"more than {LENGTH} tokens and are {done};" in message
