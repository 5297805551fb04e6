"""The thread that reads blocks ahead: how many, its errors, and its end."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.streaming.blocks import Block, BlockState
from hqqtrain.data.streaming.examples import Place, StreamPlace
from hqqtrain.data.streaming.reader import BlockReader

NONE = np.empty(0, np.int64)


def block(number: int) -> Block:
    state = BlockState(number, StreamPlace(number, (Place(),)))
    return Block(TokenSequences(NONE, NONE.astype(bool), NONE, NONE, NONE), state, 0)


def test_one_block_is_ready_and_one_is_being_read():
    begun: list[int] = []
    third = threading.Event()

    def blocks(_: Callable[[], None]) -> Iterator[Block]:
        for number in range(100):
            begun.append(number)
            if number == 2:
                third.set()
            yield block(number)

    reader = BlockReader(blocks, "data.source=x")
    assert reader.next(max_seconds=9).state.block == 0
    assert third.wait(9)
    assert [reader.next(max_seconds=9).state.block for _ in range(5)] == [1, 2, 3, 4, 5]
    reader.close()
    assert len(begun) <= 8


def test_an_error_comes_after_the_blocks_before_it_and_stays():
    def blocks(_: Callable[[], None]) -> Iterator[Block]:
        yield block(0)
        raise UserError("a bad row")

    reader = BlockReader(blocks, "data.source=x")
    assert reader.next(max_seconds=9).state.block == 0
    for _ in range(3):
        with pytest.raises(UserError, match="a bad row"):
            reader.next(max_seconds=9)


def test_waiting_has_an_end_and_can_be_stopped():
    release = threading.Event()

    def blocks(_: Callable[[], None]) -> Iterator[Block]:
        release.wait(30)
        yield block(0)

    def stop() -> None:
        raise PreemptedError("SIGTERM was received")

    before = threading.active_count()
    reader = BlockReader(blocks, "data.source=x")
    with pytest.raises(UserError, match="no data has come for 0 seconds; check the disk"):
        reader.next(max_seconds=0.01)
    with pytest.raises(PreemptedError):
        reader.next(stop, max_seconds=None)
    release.set()
    assert reader.next(max_seconds=9).state.block == 0
    reader.close()
    assert threading.active_count() <= before


def test_a_reader_that_is_closed_stops_within_a_block():
    begun = threading.Event()

    def blocks(on_batch: Callable[[], None]) -> Iterator[Block]:
        while True:
            begun.set()
            on_batch()
        yield block(0)

    before = threading.active_count()
    reader = BlockReader(blocks, "data.source=x")
    assert begun.wait(9)
    reader.close()
    assert threading.active_count() <= before
