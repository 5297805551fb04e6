"""Turn examples into sequences of tokens, stored as one flat array and packed without waste.

With packing, all plain texts form one stream, each text ends with EOS, and the stream is cut every
`max_seq_len` tokens. A long text spans several sequences, and short texts share one. The last
sequence may be shorter; it is dropped only if it has a single token, which predicts nothing.
Chats and other examples are not cut at such places: several of them share a sequence where they fit
as a whole, and so do plain texts beside them. Without packing, every example becomes one sequence.
`data.on_long` says what happens to one that is too long; by default it is truncated.

With a folder, the tokens are files that are mapped, also while they are packed: memory is needed
for a few numbers per example only.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import AUTO, DataConfig
from hqqtrain.data.best_fit import best_fit
from hqqtrain.data.encoding import encode_examples
from hqqtrain.data.examples import Example
from hqqtrain.data.mixture import SourceUse
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.token_files import TokenWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES, PACKED = "examples", "packed"
"""Names of the files with all tokens of the examples, and with those of shared sequences."""


class TokenizedData(NamedTuple):
    """The tokens of examples.

    Attributes:
        parts: All tokens of all examples, in order, and as sequences the parts of the examples that
            are trained on. Parts of texts that are cut are those in a sequence.
        sequences: The sequences to train on, or the windows to evaluate on.
        uses: How an epoch uses each source, in the order of the examples; empty for one source.
    """

    parts: TokenSequences
    sequences: TokenSequences
    uses: Sequence[SourceUse] = ()


def pack_examples(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seq_len: int,
    packing: bool = True,
    data: DataConfig | None = None,
    where: str = "data.source",
    on_batch: Callable[[], object] = lambda: None,
    folder: Path | None = None,
) -> TokenizedData:
    """Tokenize examples and arrange them in sequences of at most `max_seq_len` tokens.

    Args:
        examples: Examples; blank texts are skipped.
        tokenizer: The tokenizer of the model.
        max_seq_len: Largest number of tokens in a sequence.
        packing: Whether examples share sequences.
        data: The group `data` of the configuration.
        where: The source of the examples, for messages.
        on_batch: Called now and then; it may raise to stop.
        folder: Where to write the tokens of the examples, as `EXAMPLES`, and those of sequences
            that several examples share as a whole, as `PACKED`; None: they stay in memory.

    Raises:
        UserError: No sequence has a token to predict, an example is longer than
            `data.on_long=error` allows, or the examples cannot be tokenized.
    """
    data, kinds = data or DataConfig(), set[type]()

    def noted() -> Iterator[Example]:
        for example in examples:
            kinds.add(type(example))
            yield example

    tokens = encode_stream(noted(), tokenizer, data, where, on_batch, folder)
    is_plain_text = kinds <= {str}
    if is_plain_text and cuts_texts(data, packing=packing):
        parts = sequences = cut_stream(tokens, max_seq_len, len(tokens.stream))
    else:
        parts = cut_long(tokens, max_seq_len, data.on_long, where)
        sequences = pack_parts(parts, max_seq_len, folder) if packing else parts
    if not len(sequences) and is_plain_text:
        raise UserError(f"{where}: no text in it has a token to predict.")
    if not len(sequences):
        raise nothing_trained(where, data.on_long, max_seq_len)
    return TokenizedData(parts, sequences)


def nothing_trained(where: str, on_long: str, max_seq_len: int) -> UserError:
    """Return the error for examples that are no plain text and make no sequence."""
    fault = f"none of its examples has a trained token among its first {max_seq_len}"
    if on_long == "drop":
        fault = (
            "data.on_long=drop leaves out longer examples, and no other example has a trained "
            f"token; longer are those of more than {max_seq_len} tokens"
        )
    return UserError(
        f"{where}: {fault} (train.max_seq_len); task=data with a larger train.max_seq_len shows "
        "what is trained."
    )


def cuts_texts(data: DataConfig, *, packing: bool) -> bool:
    """Whether plain texts form one stream, which is cut whatever the lengths of the texts are."""
    return packing and data.on_long in (AUTO, "split")


def cut_stream(tokens: TokenSequences, max_seq_len: int, length: int) -> TokenSequences:
    """Cut the first `length` tokens of the stream of all texts every `max_seq_len` tokens.

    A single token is left out.
    """
    begin = np.arange(0, length, max_seq_len)
    end = np.minimum(begin + max_seq_len, length)
    predicts = end - begin > 1
    return replace(tokens, begin=begin[predicts], end=end[predicts])


def encode_stream(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    where: str,
    on_batch: Callable[[], object],
    folder: Path | None,
) -> TokenSequences:
    """Tokenize examples, each into a sequence of its own, of any length; see `pack_examples`."""
    writer = TokenWriter(folder, EXAMPLES)
    for ids, targets in encode_examples(examples, tokenizer, data, where, on_batch):
        writer.append(ids, targets)
    return writer.finish()


def cut_long(tokens: TokenSequences, max_seq_len: int, on_long: str, where: str) -> TokenSequences:
    """Return sequences of at most `max_seq_len` tokens, each of which has a token to predict.

    Args:
        tokens: The tokens of each example, as a sequence.
        max_seq_len: Largest number of tokens.
        on_long: `data.on_long`; `auto` truncates.
        where: The source of the examples, for messages.

    Raises:
        UserError: `on_long` is `error`, and an example is longer.
    """
    lengths = tokens.end - tokens.begin
    is_long = lengths > max_seq_len
    if is_long.any() and on_long == "error":
        number = int(is_long.argmax())
        raise UserError(
            f"{where}: example {number + 1} has {lengths[number]} tokens, more than "
            f"train.max_seq_len={max_seq_len}; so have {int(is_long.sum())} of {len(lengths)}. Set "
            "data.on_long=truncate, split or drop, or a larger train.max_seq_len."
        )
    begin, end = tokens.begin, tokens.end
    if on_long == "drop":
        begin, end = begin[~is_long], end[~is_long]
    elif on_long == "split":
        counts = -(-lengths // max_seq_len)
        first_piece = np.cumsum(counts) - counts
        piece = np.arange(counts.sum()) - np.repeat(first_piece, counts)  # within its example
        begin = np.repeat(begin, counts) + piece * max_seq_len
        end = np.minimum(begin + max_seq_len, np.repeat(end, counts))
    else:
        end = np.minimum(end, begin + max_seq_len)
    return tokens.with_bounds(begin, end)


def pack_parts(
    parts: TokenSequences, max_seq_len: int, folder: Path | None = None
) -> TokenSequences:
    """Let parts of examples share sequences, with little padding; see `best_fit`.

    The tokens are copied, in the order of the sequences.
    """
    items, last = best_fit(parts.end - parts.begin, max_seq_len)
    writer = TokenWriter(folder, PACKED)
    for begin, end in zip(parts.begin[items], parts.end[items], strict=True):
        targets = parts.targets[begin:end].copy()
        targets[0] = False  # no token of the same part precedes the first one
        writer.append(parts.stream[begin:end], targets)
    packed = writer.finish()
    end = packed.end[last - 1]
    return replace(packed, begin=np.append(0, end)[:-1], end=end)
