"""Turn examples of every kind into tokens, with those that are trained.

The tokens of plain text are all trained but the first. A chat trains what the assistant says, a
prompt with a completion trains the completion, and tokens bring their own labels. `data.loss_on`
changes that.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import count, groupby
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hqqtrain.common.errors import UserError
from hqqtrain.common.threads import usable_cores
from hqqtrain.config.groups import AUTO, DataConfig
from hqqtrain.data.chat.encoding import ChatEncoder, Encoded, check_is_fast, encode_spans
from hqqtrain.data.chat.library import chat_template_source
from hqqtrain.data.chat.markers import missing_markers
from hqqtrain.data.chat.template import ChatTemplate, RenderError
from hqqtrain.data.chat.turns import InexactError
from hqqtrain.data.encoding_pool import EncodedOrRefused, encode_in_order
from hqqtrain.data.examples import Completion, Conversation, Example, Tokens
from hqqtrain.data.row_examples import SHOWN_BAD_ROWS
from hqqtrain.data.sequences import IGNORE_INDEX
from hqqtrain.data.tokenization import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ALLOWED = {
    str: ("text", ("all",)),
    Completion: ("prompts and completions", ("completion", "all")),
    Conversation: ("chats", ("assistant", "last", "all")),
    Tokens: ("tokens with labels", ()),
}
"""Kind of example -> its name, and the values of `data.loss_on` that it has, the default first."""


def encode_examples(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    where: str = "data.source",
    on_batch: Callable[[], object] = lambda: None,
) -> Iterator[Encoded]:
    """Yield the token ids of every example, int32 [n], and whether each is trained, bool [n].

    Blank texts are left out, and so are the first `data.max_bad_rows` examples that are refused.
    The first token of an example is never trained.

    Args:
        examples: The examples. Those of several sources may be of several kinds.
        tokenizer: The tokenizer of the model.
        data: The group `data` of the configuration.
        where: The source of the examples, for messages.
        on_batch: Called now and then; it may raise to stop.

    Raises:
        UserError: `data.loss_on` does not fit the examples, the tokenizer fails, or more than
            `data.max_bad_rows` examples are refused.
    """
    refused = set[str]()
    for encoded in encode_or_refuse(examples, tokenizer, data, where, on_batch):
        if isinstance(encoded, UserError):
            add_refused(refused, data.max_bad_rows, encoded)
        else:
            yield encoded
    if len(refused) > SHOWN_BAD_ROWS:
        logger.warning(
            "%s: %d examples in all are left out (data.max_bad_rows=%d), for reasons as above",
            where, len(refused), data.max_bad_rows,
        )  # fmt: skip


def encode_or_refuse(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    where: str,
    on_batch: Callable[[], object],
) -> Iterator[EncodedOrRefused]:
    """Yield the tokens of every example, or why it is refused; see `encode_examples`.

    An example is refused if the chat template does not take it, or if its trained tokens cannot be
    told. Several processes encode chats and completions, if there are many; they read ahead.

    Raises:
        UserError: `data.loss_on` does not fit the examples, or the tokenizer fails.
    """
    encoder = ExampleEncoder(tokenizer, data.chat_template, data.loss_on, where)
    numbers, workers = count(1), data.workers or usable_cores()
    for kind, group in groupby(_checked(examples, data.loss_on, where), _text_or_tokens):
        rest = cast(Iterator[Any], group)
        if kind is str:
            for ids in encode_texts(rest, tokenizer, where, on_batch):
                yield ids, np.arange(len(ids)) > 0
            continue
        check_is_fast(tokenizer)
        numbered = ((next(numbers), example) for example in rest)
        processes = 1 if kind is Tokens else workers  # tokens are only copied
        yield from encode_in_order(encoder, numbered, processes, on_batch)


def add_refused(refused: set[str], max_bad_rows: int, error: UserError) -> None:
    """Count an example that is refused, and log it as one of the bad rows that are left out.

    Args:
        refused: Digests of those that were refused before, to which this one is added. An example
            that is used several times counts once.
        max_bad_rows: `data.max_bad_rows`.
        error: Why this one is refused, and where it is.

    Raises:
        UserError: There are more than `max_bad_rows`.
    """
    digest = hashlib.sha256(str(error).encode(errors="surrogatepass")).hexdigest()[:16]
    if digest in refused:
        return
    refused.add(digest)
    if len(refused) > max_bad_rows:
        raise UserError(
            f"{error} Set data.max_bad_rows above {max_bad_rows} to leave such rows out, or "
            "another data.chat_template."
        ) from error
    if len(refused) <= SHOWN_BAD_ROWS:
        logger.warning("left out (data.max_bad_rows=%d): %s", max_bad_rows, error)


def _allowed(example: Example) -> tuple[str, tuple[str, ...]]:
    """Return the name of the kind of an example, and the values of `data.loss_on` that it has."""
    kind, allowed = _ALLOWED[type(example)]
    if isinstance(example, Conversation) and example.completion_start is not None:
        return "prompts and completions", ("completion", *allowed)
    return kind, allowed


def _checked(examples: Iterable[Example], loss_on: str, where: str) -> Iterator[Example]:
    """Yield the examples, and refuse one that does not have the value of `data.loss_on`."""
    for example in examples:
        kind, allowed = _allowed(example)
        if loss_on not in (AUTO, *allowed):
            raise UserError(
                f"data.loss_on={loss_on}: the rows of {where} are {kind}; allowed are "
                f"{', '.join([AUTO, *allowed])}."
            )
        yield example


def _text_or_tokens(example: Example) -> type | None:
    """Return the type of plain text and of tokens; None for what several processes may encode."""
    return type(example) if isinstance(example, str | Tokens) else None


class ExampleEncoder:
    """Encodes examples that are not plain text.

    Args:
        tokenizer: The tokenizer of the model.
        chat_template: `data.chat_template`.
        loss_on: `data.loss_on`, which the examples must have.
        where: The source of the examples, for messages.
        warns: Whether to warn of markers that are no tokens.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", chat_template: str, loss_on: str, where: str,
        *, warns: bool = True,
    ) -> None:  # fmt: skip
        self._tokenizer, self._loss_on, self.where = tokenizer, loss_on, where
        self._chat_template, self._warns = chat_template, warns
        self._chat_encoder = cache(self._make_chat_encoder)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self._tokenizer, self._chat_template, self._loss_on, self.where)
        # For another process, which has its own cache, and no handlers for its log.
        return partial(ExampleEncoder, warns=False), arguments

    def encode(self, example: Completion | Conversation | Tokens, number: int) -> EncodedOrRefused:
        """Return the tokens of the example of a number from 1, or why it is refused."""
        loss_on = self._loss_on
        if loss_on == AUTO:
            loss_on = next(iter(_allowed(example)[1]), "")
        try:
            match example:
                case Conversation():
                    return self._chat_encoder(loss_on).encode(example)
                case Completion():
                    return self._encode_completion(example, loss_on)
                case Tokens():
                    return _encode_tokens(example)
        except (RenderError, InexactError) as error:
            place = example.place or f"example {number}"
            place = place.removeprefix(f"{self.where.partition('=')[2]}, ")  # `where` has the file
            reason = str(error).rstrip(".")
            return UserError(f"{self.where}, {place}: {reason}.")

    def _make_chat_encoder(self, loss_on: str) -> ChatEncoder:
        template = ChatTemplate(self._tokenizer, chat_template_source(self._chat_template))
        if self._warns and (missing := missing_markers(template, self._tokenizer)):
            _log_once(
                logging.WARNING,
                f"{', '.join(missing)}: the tokenizer does not have these markers of the chat "
                "template as tokens, so they are trained as ordinary text; data.add_tokens=auto "
                "adds them",
            )
        return ChatEncoder(self._tokenizer, template, loss_on)

    def _tokens_before_text(self) -> list[int]:
        """Return the special tokens that the tokenizer puts before a text, such as BOS."""
        plain, whole = (
            self._tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True)
        )
        starts = range(len(whole) - len(plain) + 1)
        return next((whole[:i] for i in starts if whole[i : i + len(plain)] == plain), [])

    def _encode_completion(self, example: Completion, loss_on: str) -> Encoded:
        """Return the tokens of a prompt and its completion, which ends with EOS."""
        if self._warns and self._tokenizer.chat_template:
            _log_once(
                logging.INFO,
                "prompts and completions that are texts, as in data.format=alpaca, are trained "
                "without the chat template of the model; to use it, write rows of messages "
                "(data.format=chat), or a prompt and a completion that are lists of messages",
            )
        text = example.prompt + example.completion
        begin = 0 if loss_on == "all" else len(example.prompt)
        ids, targets = encode_spans(self._tokenizer, text, [(begin, len(text))])
        first = self._tokens_before_text()
        ids, targets = [*first, *ids], [*[False] * len(first), *targets]
        eos = self._tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids, targets = [*ids, eos], [*targets, True]
        targets[:1] = [False]
        return np.array(ids, np.int32), np.array(targets, bool)


@cache
def _log_once(level: int, message: str) -> None:
    """Log a message once, because the held-out text has the same template."""
    logger.log(level, "%s", message)


def _encode_tokens(example: Tokens) -> Encoded:
    ids, labels = np.array(example.input_ids, np.int32), np.array(example.labels, np.int64)
    targets = labels != IGNORE_INDEX
    targets[:1] = False
    return ids, targets
