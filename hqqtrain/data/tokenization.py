"""Tokenize texts, within limits of time and memory.

A tokenizer comes from a file with patterns of its own, and a pattern may need exponential time or
memory. Such a tokenizer would stop a run without a word, so every call is watched.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import psutil

from hqqtrain.common.errors import UserError
from hqqtrain.data.held_out import is_blank
from hqqtrain.data.sequences import chunks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BATCH_TEXTS = 256
"""Largest number of texts in one call of the tokenizer."""

MAX_BATCH_CHARACTERS = 1 << 22
"""Largest number of characters in one call of the tokenizer, which needs 100 bytes for each.

A longer text is tokenized in pieces.
"""

_BASE_SECONDS, _SECONDS_PER_CHARACTER = 5.0, 1 / 50_000
"""Most CPU time of one call. Tokenizers take 1 second for about a million characters."""

_BASE_BYTES, _BYTES_PER_CHARACTER = 1 << 28, 600
"""Most memory of one call, where a character takes up to 4 tokens of 100 bytes."""

_POLL_SECONDS = 0.05


def encode_texts(
    texts: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    where: str = "data.source",
    on_batch: Callable[[], object] = lambda: None,
) -> Iterator[np.ndarray]:
    """Yield the tokens of every text that is not blank, int32 [n], with its special tokens.

    Every text ends with EOS, whether or not the tokenizer adds it.

    Args:
        texts: The texts.
        tokenizer: The tokenizer of the model.
        where: The source of the texts, for messages.
        on_batch: Called before every batch of texts; it may raise to stop.

    Raises:
        UserError: The tokenizer fails, or needs too much time or memory.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        logger.warning("the tokenizer has no EOS token: texts are joined without one.")
    for batch in _batches(texts):
        on_batch()
        for ids in _encode(batch, tokenizer, where):
            lacks_eos = eos is not None and (not ids or ids[-1] != eos)
            yield np.array([*ids, eos] if lacks_eos else ids, np.int32)


def encode_text(
    text: str, tokenizer: "PreTrainedTokenizerBase", where: str, *, keeps_eos: bool = True
) -> np.ndarray:
    """Return the tokens of one text, int32 [n], with the special tokens of the tokenizer only.

    Args:
        text: The text, of any length.
        tokenizer: The tokenizer of the model.
        where: The source of the text, for messages.
        keeps_eos: Whether an EOS that the tokenizer puts after the text is kept.

    Raises:
        UserError: The tokenizer fails, or needs too much time or memory.
    """
    (ids,) = _encode([text], tokenizer, where)
    if not keeps_eos and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return np.array(ids, np.int32)


def check_token_ids(
    stream: np.ndarray, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, where: str
) -> None:
    """Check that the model has an embedding for every token.

    Args:
        stream: int32 [T], the tokens.
        tokenizer: The tokenizer that has made them.
        vocab_size: Number of rows of the embeddings, or of the head if it has fewer.
        where: The source of the texts, for the message.

    Raises:
        UserError: A token id is `vocab_size` or larger.
    """
    largest = max((int(stream[first:last].max()) for first, last in chunks(len(stream))), default=0)
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{where}: its text has the token {token!r} with the id {largest}, but the model has "
            f"only {vocab_size} embeddings (vocab_size), for ids below {vocab_size}; the tokenizer "
            f"has {len(tokenizer)} tokens. Resize the embeddings in transformers "
            "(model.resize_token_embeddings), use the tokenizer of the model, or remove the token "
            "from the text."
        )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of texts that are not blank, within the limits of a batch."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if is_blank(text):
            continue
        if batch and (
            len(batch) == MAX_BATCH_TEXTS or characters + len(text) > MAX_BATCH_CHARACTERS
        ):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


def _encode(batch: list[str], tokenizer: "PreTrainedTokenizerBase", where: str) -> list[list[int]]:
    """Return the token ids of every text."""

    def call(texts: list[str], **options: bool) -> list[list[int]]:
        encodings = watch(
            lambda: tokenizer(texts, return_attention_mask=False, verbose=False, **options),
            sum(map(len, texts)),
            where,
        )
        return encodings["input_ids"]

    if len(batch[0]) <= MAX_BATCH_CHARACTERS:
        return call(batch)
    # A single long text: tokenize pieces, and put the special tokens of the first around them all.
    pieces = cut_text(batch[0], MAX_BATCH_CHARACTERS)
    plain = [call([piece], add_special_tokens=False)[0] for piece in pieces]
    (first,) = call([pieces[0]])
    offsets = range(len(first) - len(plain[0]) + 1)
    prefix = next((i for i in offsets if first[i : i + len(plain[0])] == plain[0]), 0)
    return [[*first[:prefix], *chain(*plain), *first[prefix + len(plain[0]) :]]]


def cut_text(text: str, length: int) -> list[str]:
    """Cut a text into pieces of at most `length` characters, where tokens end, too, if possible.

    That is after the last single line ending between other text, or else after the last line ending
    before other text, or before the last space after a word. Some tokenizers split several line
    endings before other text, and some join them.
    """

    def ends_line(i: int) -> bool:
        return text[i - 1] == "\n" and not text[i].isspace()

    def ends_only_line(i: int) -> bool:
        return ends_line(i) and not text[i - 2].isspace()

    def ends_word(i: int) -> bool:
        return text[i] == " " and not text[i - 1].isspace()

    pieces, start = [], 0
    while len(text) - start > length:
        places = range(start + length, start + 1, -1)
        found = (
            place
            for test in (ends_only_line, ends_line, ends_word)
            for place in places
            if test(place)
        )
        end = next(found, start + length)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def watch(call: Callable[[], T], characters: int, where: str) -> T:
    """Return the result of `call`, a call of the tokenizer on so many characters.

    Raises:
        UserError: The call fails, or takes more CPU time or memory than any sound tokenizer.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # a panic in Rust is no Exception
            errors.append(error)

    max_seconds = _BASE_SECONDS + characters * _SECONDS_PER_CHARACTER
    max_bytes: float = _BASE_BYTES + characters * _BYTES_PER_CHARACTER
    clock = time.process_time
    if threading.current_thread() is not threading.main_thread():
        # A training in the same process takes processor time and memory, too: limit the real time.
        max_seconds, max_bytes, clock = 20 * max_seconds, float("inf"), time.monotonic
    memory = psutil.Process().memory_info
    start_seconds, start_bytes = clock(), memory().rss
    # A daemon, because the interpreter would wait for any other thread at its end.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_POLL_SECONDS)
    while thread.is_alive():
        seconds, grown = clock() - start_seconds, memory().rss - start_bytes
        if seconds > max_seconds or grown > max_bytes:
            raise UserError(
                f"{where}: the tokenizer has used {seconds:.0f} s and {grown / 2**20:.0f} MiB for "
                f"{characters} characters and is not finished: a pattern in its tokenizer.json is "
                "too expensive. Use the original tokenizer of the model."
            )
        thread.join(_POLL_SECONDS)
    if errors:
        if isinstance(errors[0], UserError):
            raise errors[0]
        raise UserError(
            f"{where}: the tokenizer of the model cannot encode its text: "
            f"{str(errors[0])[:200] or type(errors[0]).__name__}"
        ) from errors[0]
    return results[0]
