"""Turn an endless stream of examples into blocks of sequences, packed and shuffled.

A block is what is tokenized, packed and shuffled together, so memory does not depend on the size of
the data. A block is a function of the state before it, which is small: the place in the sources and
the tokens that the block before it has left over. To resume a run, one block is read again.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hqqtrain.common.errors import UserError
from hqqtrain.config.data_sources import describe_source
from hqqtrain.config.groups import AUTO, DataConfig, TrainConfig
from hqqtrain.data.chat.encoding import Encoded
from hqqtrain.data.encoding import add_refused, encode_or_refuse
from hqqtrain.data.examples import Example
from hqqtrain.data.order import permutation
from hqqtrain.data.packing import (
    cut_long,
    cut_stream,
    cuts_texts,
    nothing_trained,
    pack_parts,
)
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.streaming.examples import ExampleStream, Place, StreamPlace
from hqqtrain.data.tokenization import check_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

UNSHUFFLED_BLOCK = 1000
"""Sequences of a block with `data.shuffle_buffer=0`, which are packed together."""

EMPTY = np.empty(0, np.int32), np.empty(0, bool)
"""No tokens."""


@dataclass(frozen=True)
class BlockState:
    """The state before a block.

    Attributes:
        block: Number of blocks before it.
        place: The place of its first example.
        rest: Tokens of plain text that did not fill a sequence of the block before it.
        refused: Digests of the examples before it, in the same pass, that the template has
            refused; see `add_refused`.
    """

    block: int
    place: StreamPlace
    rest: Encoded = EMPTY
    refused: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        ids, targets = self.rest
        return {
            "block": self.block,
            "examples": self.place.examples,
            "places": [list(place) for place in self.place.places],
            "refused_rows": sorted(self.refused),
            "rest": {"tokens": ids.tolist(), "starts": np.flatnonzero(~targets).tolist()},
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "BlockState":
        ids = np.array(state["rest"]["tokens"], np.int32)
        targets = np.ones(len(ids), bool)
        targets[state["rest"]["starts"]] = False
        places = tuple(Place(*place) for place in state["places"])
        place = StreamPlace(state["examples"], places)
        return cls(state["block"], place, (ids, targets), frozenset(state.get("refused_rows", ())))


@dataclass(frozen=True)
class Block:
    """Sequences that were packed and shuffled together.

    Attributes:
        sequences: The sequences, in the order in which they are trained.
        state: The state before the block.
        passes: Number of complete passes over the data before its last example.
    """

    sequences: TokenSequences
    state: BlockState
    passes: int

    @cached_property
    def digest(self) -> str:
        """The digest of the sequences."""
        return self.sequences.digest


class _Group(NamedTuple):
    """The examples of a block.

    Attributes:
        examples: Their tokens, in order.
        place: The place after them.
        ends_pass: Whether a pass ends with them: that over a single source ends with the end of a
            block, as an epoch ends without streaming.
        refused: Digests of the examples of the pass up to `place` that the template has refused.
    """

    examples: list[Encoded]
    place: StreamPlace
    ends_pass: bool
    refused: frozenset[str]


class BlockStream:
    """Reads blocks of sequences, without end.

    Args:
        examples: The examples.
        tokenizer: The tokenizer of the model, which no other thread may use.
        train: The group `train` of the configuration, for the sequences and the seed.
        data: The group `data` of the configuration.
        vocab_size: Number of token ids that the model knows; None if there is no model.
    """

    def __init__(
        self, examples: ExampleStream, tokenizer: "PreTrainedTokenizerBase", train: TrainConfig,
        data: DataConfig, vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        self._examples, self._tokenizer, self._vocab_size = examples, tokenizer, vocab_size
        self._train, self._data = train, data
        self._where = f"data.source={describe_source(data.source)}"
        self._has_warned = False  # that examples are too long
        self._block_size = data.shuffle_buffer or UNSHUFFLED_BLOCK
        self._is_cut = examples.is_plain_text and cuts_texts(data, packing=train.packing)

    def read(
        self, state: BlockState | None = None, on_batch: Callable[[], object] = lambda: None
    ) -> Iterator[Block]:
        """Yield blocks from a state on; some may have no sequence.

        Args:
            state: The state before the first block; None: the beginning.
            on_batch: Called now and then; it may raise to stop.

        Raises:
            UserError: The data cannot be read or tokenized, or has nothing to train on.
        """
        state = state or BlockState(0, self._examples.start())
        passes = state.place.passes  # at the last sequence
        for examples, place, ends_pass, refused in self._groups(state, on_batch):
            sequences, rest = self._sequences([state.rest, *examples], state.place, ends_pass)
            passes_of_block = place.passes - ends_pass
            passes = passes_of_block if len(sequences) else passes
            if passes_of_block > passes + 1:
                raise nothing_trained(self._where, self._data.on_long, self._train.max_seq_len)
            yield Block(self._shuffled(sequences, state.block), state, passes_of_block)
            state = BlockState(state.block + 1, place, rest, refused)

    def _groups(self, start: BlockState, on_batch: Callable[[], object]) -> Iterator[_Group]:
        """Yield the tokens of the examples of each block, in order."""
        places = deque[StreamPlace]()  # after each example that was read ahead

        def examples() -> Iterator[Example]:
            for place, example in self._examples.read(start.place):
                places.append(place)
                yield example

        group, tokens = list[Encoded](), 0
        last, refused = start.place, set(start.refused)
        max_tokens = self._block_size * self._train.max_seq_len
        for encoded in encode_or_refuse(
            examples(), self._tokenizer, self._data, self._where, on_batch
        ):
            place = places.popleft()
            if place.passes > last.passes:
                refused.clear()
                if self._examples.has_passes:
                    after = StreamPlace(last.examples, (Place(place.passes),))
                    yield _Group(group, after, True, frozenset())
                    group, tokens = [], 0
            if isinstance(encoded, UserError):
                add_refused(refused, self._data.max_bad_rows, encoded)
                encoded = EMPTY
            group.append(encoded)
            tokens, last = tokens + len(encoded[0]), place
            is_full = not self._train.packing and len(group) >= self._block_size
            if is_full or tokens >= max_tokens:
                yield _Group(group, last, False, frozenset(refused))
                group, tokens = [], 0

    def _sequences(
        self, encoded: list[Encoded], start: StreamPlace, ends_pass: bool
    ) -> tuple[TokenSequences, Encoded]:
        """Return the sequences of examples, and the tokens that are left over.

        Args:
            encoded: The tokens left over before, and those of the examples.
            start: The place of the first example.
            ends_pass: Whether no tokens may be left over.
        """
        ids, targets = (np.concatenate(arrays) for arrays in zip(*encoded, strict=True))
        where, length = self._where, self._train.max_seq_len
        if self._vocab_size is not None:
            check_token_ids(ids, self._tokenizer, self._vocab_size, where)
        if self._is_cut:
            end = len(ids) if ends_pass else len(ids) - len(ids) % length
            starts = np.flatnonzero(~targets)
            texts = TokenSequences(ids, targets, starts, starts, np.append(starts[1:], len(ids)))
            # The rest is copied, because a view would keep the whole block in memory.
            return cut_stream(texts, length, end), (ids[end:].copy(), targets[end:].copy())
        lengths = np.array([len(each) for each, _ in encoded[1:]], np.int64)
        starts = np.cumsum(lengths) - lengths
        if start.examples:
            where = f"{where}, after the first {start.examples:,} examples"
        self._warn_of_long(lengths)
        whole = TokenSequences(ids, targets, starts, starts, starts + lengths)
        parts = cut_long(whole, length, self._data.on_long, where)
        return pack_parts(parts, length) if self._train.packing and len(parts) else parts, EMPTY

    def _warn_of_long(self, lengths: np.ndarray) -> None:
        """Warn of the first block that has examples which are too long."""
        length, on_long = self._train.max_seq_len, self._data.on_long
        number = int(np.count_nonzero(lengths > length))
        if number and not self._has_warned and on_long in (AUTO, "truncate", "drop"):
            self._has_warned = True
            logger.warning(
                "%s: %d of %d examples that were read together have more than %d tokens and are "
                "%s; later ones are not reported; see data.on_long and train.max_seq_len",
                self._where, number, len(lengths), length,
                "left out" if on_long == "drop" else "truncated",
            )  # fmt: skip

    def _shuffled(self, sequences: TokenSequences, block: int) -> TokenSequences:
        """Return the sequences of a block in the order in which they are trained.

        If all data is a single block, it is the order of each epoch without streaming.
        """
        if not self._data.shuffle_buffer or not len(sequences):
            return sequences
        return sequences.select(permutation(len(sequences), self._train.seed, block))
