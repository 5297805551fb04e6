"""Tokenize conversations, with the tokens that are trained.

A rendered chat is tokenized as a whole, as for a prompt. A token is trained if it lies inside a
trained span. If a token lies across the edge of a span, as a newline that joins those of the header
before it, or if the first word of an answer changes the tokens of the header, the text is tokenized
in parts. So it is at inference, where the model's tokens follow those of the prompt.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from hqqtrain.common.errors import UserError
from hqqtrain.data.chat.end_markers import end_markers
from hqqtrain.data.chat.spans import trained_spans
from hqqtrain.data.chat.template import ChatTemplate, Span
from hqqtrain.data.chat.turns import InexactError
from hqqtrain.data.examples import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids, int32 [n], and whether each is trained, bool [n]. The first is never trained."""


class ChatEncoder:
    """Encodes conversations.

    Args:
        tokenizer: A fast tokenizer, which tells the characters of each token.
        template: The chat template.
        loss_on: `assistant`, `last`, `completion` or `all`, as for `trained_spans`.

    Raises:
        UserError: The tokenizer is not a fast one.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, loss_on: str
    ) -> None:
        check_is_fast(tokenizer)
        self._tokenizer, self._template, self._loss_on = tokenizer, template, loss_on

    def encode(self, conversation: Conversation) -> Encoded:
        """Return the tokens of a conversation.

        A text that ends inside a trained span, without a token that ends a turn, gets EOS.

        Raises:
            InexactError: The trained tokens cannot be told.
            RenderError: The template does not take the messages.
        """
        text, spans = trained_spans(self._template, conversation, self._loss_on)
        ids, targets = encode_spans(self._tokenizer, text, spans)
        eos = self._tokenizer.eos_token_id
        ends = (*end_markers(self._template), self._tokenizer.eos_token or "")
        ends_open = bool(spans) and not text.endswith(tuple(filter(None, ends)))
        if ends_open and spans[-1][1] == len(text) and eos is not None:
            ids, targets = [*ids, eos], [*targets, True]
        if targets:
            targets[0] = False
        return np.array(ids, np.int32), np.array(targets, bool)


def encode_spans(
    tokenizer: "PreTrainedTokenizerBase", text: str, spans: list[Span]
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a text, and whether each lies inside a span.

    Args:
        tokenizer: A fast tokenizer, which adds no special tokens here.
        text: The text.
        spans: Parts of the text, in order.

    Raises:
        InexactError: A token lies across the edge of a span.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, targets, place, previous_end = encoding["input_ids"], [], 0, 0
    for begin, end in encoding["offset_mapping"]:
        # The offsets of most tokenizers leave out the space that a token begins with.
        begin, previous_end = min(begin, previous_end), end
        while place < len(spans) and spans[place][1] <= begin:
            place += 1
        start, stop = spans[place] if place < len(spans) else (len(text), len(text))
        if begin < start < end or begin < stop < end:
            return _encode_parts(tokenizer, text, spans, ids)
        targets.append(start <= begin < stop)
    if any(_looks_ahead(tokenizer, text, start) for start, _ in spans):
        return _encode_parts(tokenizer, text, spans, ids)
    return ids, targets


def _looks_ahead(tokenizer: "PreTrainedTokenizerBase", text: str, place: int) -> bool:
    """Whether whitespace before a place has other tokens than at the end of a prompt.

    The pattern of GPT-2's tokenizer leaves the last whitespace before a word to that word, so two
    line endings are two tokens before a word, and one at the end of a prompt.
    """
    start = len(text[:place].rstrip())
    if place - start < 2 or place == len(text):
        return False
    return _splits_whitespace(tokenizer, text[start:place], text[place])


@lru_cache(maxsize=4096)
def _splits_whitespace(tokenizer: "PreTrainedTokenizerBase", space: str, following: str) -> bool:
    """Whether `following` changes the tokens of the whitespace before it."""
    alone, whole = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in (f"x{space}", f"x{space}{following}")
    )
    return bool(whole[: len(alone)] != alone)


def _encode_parts(
    tokenizer: "PreTrainedTokenizerBase", text: str, spans: list[Span], whole: list[int]
) -> tuple[list[int], list[bool]]:
    """Tokenize each span, and the text between the spans, by itself.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        spans: Parts of the text, in order.
        whole: The token ids of the whole text.
    """
    ids: list[int] = []
    targets: list[bool] = []
    position = 0
    for begin, end in [*spans, (len(text), len(text))]:
        for part, is_trained in ((text[position:begin], False), (text[begin:end], True)):
            tokens = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            ids += tokens
            targets += [is_trained] * len(tokens)
        position = end
    if tokenizer.decode(ids) != tokenizer.decode(whole):
        raise InexactError(
            "a token lies across the edge of a trained part, and this tokenizer cannot tokenize "
            "parts of a text by themselves."
        )
    return ids, targets


def check_is_fast(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that does not tell which characters its tokens have.

    Raises:
        UserError: It is not a fast tokenizer.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"data.loss_on: {type(tokenizer).__name__} does not tell which characters a token has, "
            "so the trained tokens cannot be told; use a model with a tokenizer.json."
        )
