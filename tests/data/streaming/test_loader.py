"""The streaming loader: any number of ranks, resuming at every batch, errors of the reader."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import on_ranks

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.config.groups import DataConfig, EvalConfig, TrainConfig
from hqqtrain.data.layout import PACKED, BatchLayout
from hqqtrain.data.loader import PackedLoader
from hqqtrain.data.packing import pack_examples
from hqqtrain.data.sources import load_training_texts
from hqqtrain.data.streaming.blocks import Block, BlockState, BlockStream
from hqqtrain.data.streaming.loader import StreamingLoader, run_alone
from hqqtrain.data.streaming.sources import open_training_stream
from hqqtrain.distributed.comm import Communicator
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer

NO_EVAL = EvalConfig(source=None)
TRAIN = TrainConfig(max_steps=20, global_batch_size=4, micro_batch_size=2, max_seq_len=24, seed=1)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i} " * (1 + i % 9)}) + "\n"
                            for i in range(60)))  # fmt: skip
    return str(file)


def make_loader(
    source: str, state: dict | None = None, *, buffer: int = 6, run_on_rank0: Callable = run_alone,
    rank: int = 0, world_size: int = 1, layout: BatchLayout = PACKED,
    check: Callable[[], object] = lambda: None,
) -> StreamingLoader:  # fmt: skip
    data = DataConfig(source=source, shuffle_buffer=buffer, streaming=True)
    loader = StreamingLoader(
        f"data.source={source}", TRAIN, run_on_rank0,
        rank=rank, world_size=world_size, layout=layout,
    )  # fmt: skip
    if state:
        loader.load_state_dict(json.loads(json.dumps(state)))
    if rank == 0:
        stream = open_training_stream(data, NO_EVAL)
        loader.start(BlockStream(stream, load_tokenizer(TINY_FOLDER), TRAIN, data), check)
    return loader


def content(batches: Iterator) -> list[list[list[int]]]:
    return [batch[name].tolist() for batch in batches for name in ("input_ids", "labels")]


@pytest.mark.parametrize("layout", [PACKED, BatchLayout(packs=False)])
def test_batches_are_those_of_data_in_memory_if_the_buffer_has_all_of_it(rows, layout):
    data = DataConfig(source=rows)
    sequences = pack_examples(
        load_training_texts(data, NO_EVAL), load_tokenizer(TINY_FOLDER), max_seq_len=24
    ).sequences
    in_memory = PackedLoader(sequences, TRAIN, layout=layout)
    streamed = make_loader(rows, buffer=1000, layout=layout)
    assert len(sequences) < 15 * 4
    for index in range(20):  # more than a pass
        assert content(streamed.batches(index)) == content(in_memory.batches(index))
        assert streamed.target_token_count(index) == in_memory.target_token_count(index)
        assert streamed.token_count(index) == in_memory.token_count(index)
        assert streamed.describe(index)["tokens"] == in_memory.describe(index)["tokens"]
        assert streamed.epoch(index) == (index * 4 + 3) // len(sequences)
    assert streamed.total_steps == 20
    streamed.close()


@pytest.mark.parametrize("layout", [PACKED, BatchLayout(packs=False)])
def test_ranks_share_the_global_batches_of_one_process(rows, layout):
    alone = make_loader(rows, layout=layout)
    shared: dict[int, object] = {}
    loaders = [
        make_loader(
            rows, rank=rank, world_size=2, layout=layout,
            run_on_rank0=(lambda work: shared.setdefault(0, work())) if rank == 0
            else (lambda work: shared.pop(0)),
        )
        for rank in range(2)
    ]  # fmt: skip
    for index in range(12):
        whole = alone.describe(index)["tokens"]
        parts = [content(loader.batches(index)) for loader in loaders]
        assert [loader.describe(index)["tokens"] for loader in loaders] == [whole, whole]
        targets = sum(label >= 0 for part in parts for labels in part[1::2] for row in labels
                      for label in row)  # fmt: skip
        assert targets == loaders[1].target_token_count(index) == alone.target_token_count(index)
        assert len(parts[0]) == len(parts[1])  # all ranks run the same number of micro-batches
    alone.close()
    loaders[0].close()


def test_a_resumed_loader_gives_the_same_rest_at_every_batch(rows):
    loader = make_loader(rows)
    states, batches = [], []
    for index in range(14):
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.append((content(loader.batches(index)), loader.epoch(index + 1)))
    loader.close()
    assert batches[-1][1] >= 1.0
    for begin, state in enumerate(states[1:], start=1):
        resumed = make_loader(rows, state)
        assert resumed.state_dict() == state
        for index in range(begin, min(begin + 4, 14)):
            assert (content(resumed.batches(index)), resumed.epoch(index + 1)) == batches[index]
        resumed.close()


def test_batches_that_are_skipped_are_read_and_dropped(rows):
    loader, other = make_loader(rows), make_loader(rows)
    for index in range(8):
        last = content(loader.batches(index))
    assert content(other.batches(7)) == last
    assert other.state_dict() == loader.state_dict()
    for each in (loader, other):
        each.close()


def test_changed_text_is_refused_when_the_run_resumes(rows):
    loader = make_loader(rows)
    list(loader.batches(0))
    state = loader.state_dict()
    loader.close()
    Path(rows).write_text(Path(rows).read_text().replace("row 3 ", "raw 3 "))
    with pytest.raises(UserError, match="its text is not that of the checkpoint any more"):
        make_loader(rows, state)


def test_an_error_of_the_reader_reaches_the_training_once_it_needs_the_row(rows):
    lines = [*Path(rows).read_text().splitlines() * 6, '{"text"']
    Path(rows).write_text("\n".join(lines))
    loader = make_loader(rows)
    with pytest.raises(UserError, match=r"cannot read .*rows\.jsonl, line 361: "):
        read_batches(loader, 200)
    with pytest.raises(UserError, match="line 361"):  # also if it is asked again
        list(loader.batches(200))


def test_a_request_to_stop_comes_before_an_error_of_the_reader(rows, monkeypatch):
    """A signal may have killed a process that encodes."""
    Path(rows).write_text(Path(rows).read_text() * 6 + '{"text"')
    loader = make_loader(rows)
    monkeypatch.setattr(loader, "_check", stop)
    with pytest.raises(PreemptedError):
        read_batches(loader, 200)
    Path(rows).write_text('{"text"')
    with pytest.raises(PreemptedError):
        make_loader(rows, check=stop)


def test_a_pass_is_logged_when_training_begins_it(rows, caplog):
    caplog.set_level("INFO")
    loader = make_loader(rows)
    for index in range(30):
        list(loader.batches(index))
        begun = [line for line in caplog.messages if line.endswith("over the data begins")]
        assert len(begun) == int(loader.epoch(index)), index
    assert begun[0] == f"data.source={rows}: pass 2 over the data begins"
    loader.close()


def read_batches(loader: StreamingLoader, number: int) -> None:
    for index in range(number):
        list(loader.batches(index))


def _read_a_bad_row(rank: int, comm: Communicator, file: str) -> None:
    loader = make_loader(file, rank=rank, world_size=comm.size, run_on_rank0=comm.run_on_rank0)
    read_batches(loader, 2000)


@pytest.mark.ranks
def test_an_error_in_row_1000_reaches_both_ranks(tmp_path: Path):
    lines = [json.dumps({"text": f"row {i}"}) for i in range(999)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, '{"text"', *lines]))
    first, second = on_ranks(_read_a_bad_row, 2, str(tmp_path / "rows.jsonl"))
    assert "rows.jsonl, line 1000: " in first
    assert first == second


class _SlowBlocks:
    """A data set whose second block takes a while."""

    def __init__(self, blocks: BlockStream, seconds: float) -> None:
        self._blocks, self._seconds = blocks, seconds

    def read(self, state: BlockState | None, on_batch: Callable) -> Iterator[Block]:
        for number, block in enumerate(self._blocks.read(state, on_batch)):
            time.sleep(self._seconds if number == 1 else 0)
            yield block


def stop() -> None:
    raise PreemptedError("SIGTERM was received")


@pytest.fixture
def slow_loader(rows) -> Iterator[StreamingLoader]:
    data = DataConfig(source=rows, shuffle_buffer=6)
    stream = open_training_stream(data, NO_EVAL)
    blocks = BlockStream(stream, load_tokenizer(TINY_FOLDER), TRAIN, data)
    loader = StreamingLoader("data.source=rows", TRAIN, check=stop)
    loader.start(_SlowBlocks(blocks, 1.2))
    yield loader
    loader.close()


def test_the_log_says_how_long_training_waits_for_data(slow_loader, caplog):
    read_batches(slow_loader, 3)
    (record,) = [r for r in caplog.records if "has waited 1 s for data, " in r.message]
    assert record.levelname == "WARNING"


def test_data_that_does_not_come_ends_the_training(slow_loader, monkeypatch):
    monkeypatch.setattr(slow_loader, "_check", lambda: None)
    monkeypatch.setattr("hqqtrain.data.streaming.loader.MAX_WAIT_SECONDS", 0.3)
    with pytest.raises(UserError, match="no data has come for 0 seconds"):
        read_batches(slow_loader, 3)


def test_a_request_to_stop_does_not_wait_for_data_and_loses_none(slow_loader, rows, monkeypatch):
    monkeypatch.setattr("hqqtrain.data.streaming.loader.PATIENCE_SECONDS", 0.2)
    index, before = 0, slow_loader.state_dict()
    with contextlib.suppress(PreemptedError):
        while index < 20:
            list(slow_loader.batches(index))
            index, before = index + 1, slow_loader.state_dict()
    assert 0 < index < 20
    assert slow_loader.state_dict() == before
    resumed, whole = make_loader(rows, before), make_loader(rows)
    next_index = before["batch_index"]
    assert content(resumed.batches(next_index)) == content(whole.batches(next_index))
    for loader in (resumed, whole):
        loader.close()
