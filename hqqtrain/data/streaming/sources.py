"""Open `data.source` as a stream, and hold out a part of it, without reading all of it.

Without streaming, the share of the texts with the lowest hashes is held out, which takes a pass
over all of them. Here each text is held out with that share as its probability, by its hash alone.
So equal texts stay together, wherever they are, and no text that is held out is ever trained on. To
measure, the first held-out texts are enough.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

from hqqtrain.common.errors import UserError
from hqqtrain.config.data_sources import describe_source, listed_sources, source_paths
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.examples import Example, text_of
from hqqtrain.data.held_out import is_blank, text_hash
from hqqtrain.data.mixture import ChainedExamples, is_repeated
from hqqtrain.data.overlap import check_overlap
from hqqtrain.data.single_source import SourceTexts, open_source
from hqqtrain.data.sources import (
    evaluates_on_training_source,
    load_held_out_texts,
    open_training_sources,
    settings_of_sources,
)
from hqqtrain.data.streaming.examples import ExampleStream, StreamPart, StreamSource

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 16
"""Characters of held-out text that are read for each of `eval.tokens`; a token has 4 or so."""

MAX_CHARACTERS = 1 << 30
"""Most characters of a source that are read to find held-out texts."""

COMPARED_CHARACTERS = 1 << 24
"""Characters from the beginning of the training text that are compared with the held-out text."""

SHOWN_EXAMPLES = 1000
"""Examples from the beginning of the data that stand for all of it, as in task=data."""


@dataclass(frozen=True)
class FirstExamples:
    """The examples from the beginning that `keeps` selects; every iteration reads them again.

    Attributes:
        examples: The examples, which may be without end.
        keeps: Whether an example is selected; blank ones never are.
        max_examples: Most examples to return.
        max_characters: Characters of selected examples after which no more are returned.
        max_read: Characters of all examples after which no more are read.
    """

    examples: Iterable[Example]
    keeps: Callable[[Example], bool] = lambda example: True
    max_examples: int | None = None
    max_characters: int = MAX_CHARACTERS
    max_read: int = MAX_CHARACTERS

    def __iter__(self) -> Iterator[Example]:
        return islice(self._selected(), self.max_examples)

    def _selected(self) -> Iterator[Example]:
        read = characters = 0
        for example in self.examples:
            size = len(text_of(example))
            read += size
            if not is_blank(example) and self.keeps(example):
                characters += size
                yield example
            if characters >= self.max_characters or read >= self.max_read:
                return


def open_training_stream(data: DataConfig, evaluation: EvalConfig, seed: int = 0) -> ExampleStream:
    """Open `data.source` as an endless stream of the examples that are not held out.

    Args:
        data: The group `data` of the configuration.
        evaluation: Decides what is held out.
        seed: Seed of the mixture of sources with weights.

    Raises:
        UserError: The source cannot be opened.
    """
    opened = [
        open_source(path, settings, "data.source") for path, settings in settings_of_sources(data)
    ]
    keeps = _training_filter(opened, data, evaluation)
    sources = []
    for source, texts in zip(listed_sources(data.source), opened, strict=True):
        parts = [StreamPart(texts.train, keeps)] * int(source.repeats)
        if share := source.repeats % 1:
            parts.append(StreamPart(texts.train, _repeating(share, keeps)))
        sources.append(StreamSource(f"data.source={source.path}", parts, source.weight or 1.0))
    if len(sources) > 1 and listed_sources(data.source)[0].weight is not None:
        return ExampleStream(sources, seed)
    parts = [part for source in sources for part in source.parts]
    return ExampleStream([StreamSource(f"data.source={describe_source(data.source)}", parts)])


def first_training_texts(data: DataConfig, evaluation: EvalConfig) -> Iterable[Example]:
    """Return the first `SHOWN_EXAMPLES` examples to train on; see `load_training_texts`.

    Raises:
        UserError: The source cannot be opened, or overlaps with the held-out text.
    """
    stream = open_training_stream(data, evaluation)
    check_streamed_overlap(stream, data, evaluation)
    logger.info(
        "data.streaming=true: the figures are those of the first examples, at most %s.",
        f"{SHOWN_EXAMPLES:,}",
    )
    return FirstExamples(stream.first_pass(), max_examples=SHOWN_EXAMPLES)


def streamed_held_out_texts(
    evaluation: EvalConfig, data: DataConfig, *, logs: bool = True
) -> Iterable[Example]:
    """Load enough held-out examples to measure `eval.tokens` tokens; see `load_held_out_texts`.

    Args:
        evaluation: The group `eval` of the configuration.
        data: The group `data` of the configuration.
        logs: Whether to log how many texts are measured.

    Raises:
        UserError: The source cannot be read, or no text of its first GiB is held out.
    """
    assert evaluation.source is not None
    if not evaluates_on_training_source(evaluation, data):
        return load_held_out_texts(evaluation, data)
    enough = CHARACTERS_PER_TOKEN * evaluation.tokens
    texts = open_training_sources(data, warns=False)
    if texts.held_out is not None:
        return _first_of_each(texts.held_out, enough)
    found = list(_first_of_each(texts.train, enough, _hash_filter(data.validation)))
    where = f"data.source={describe_source(data.source)}"
    if not found:
        raise UserError(
            f"{where}: none of its texts is held out by its hash (data.validation="
            f"{data.validation}); use a larger data.validation, set eval.source to another source "
            "or to null, or set data.streaming=false, which holds out at least one."
        )
    if logs:
        logger.info(
            "%s: texts are held out by their hashes (data.validation=%s); the first %d are "
            "measured.",
            where, data.validation, len(found),
        )  # fmt: skip
    return found


def check_streamed_overlap(stream: ExampleStream, data: DataConfig, evaluation: EvalConfig) -> None:
    """Compare the held-out text with the beginning of the training text; see `check_overlap`.

    Raises:
        UserError: More than a few of the held-out characters are also in that beginning.
    """
    if evaluation.source is None:
        return
    beginning = FirstExamples(stream.first_pass(), max_read=COMPARED_CHARACTERS)
    held_out = list(streamed_held_out_texts(evaluation, data, logs=False))
    where, fix = f"data.source={describe_source(data.source)}", None
    if not evaluates_on_training_source(evaluation, data):
        where, fix = f"eval.source={evaluation.source}, {where}", ", or set eval.source=auto"
    check_overlap(beginning, held_out, where, fix)


def stream_digest(stream: ExampleStream, data: DataConfig) -> str:
    """Return the sha256 of the sources, and of the names and sizes of their files, in hex.

    The content is not read as a whole. When a run resumes, the block that it continues in is
    compared, too.
    """
    files = [(file.name, file.stat().st_size) for file in stream.files]
    return hashlib.sha256(json.dumps([source_paths(data.source), files]).encode()).hexdigest()


def _training_filter(
    opened: list[SourceTexts], data: DataConfig, evaluation: EvalConfig
) -> Callable[[Example], bool]:
    """Return a function that tells whether an example of the opened sources is trained on."""
    has_split = any(texts.held_out is not None for texts in opened)
    if evaluation.source is None or has_split or not evaluates_on_training_source(evaluation, data):
        return lambda example: True
    is_held_out = _hash_filter(data.validation)
    return lambda example: not is_held_out(example)


def _first_of_each(
    examples: Iterable[Example],
    max_characters: int,
    keeps: Callable[[Example], bool] = lambda example: True,
) -> ChainedExamples:
    """Return the first examples of each source, with about the same number of characters."""
    parts = examples.parts if isinstance(examples, ChainedExamples) else [examples]
    share = -(-max_characters // len(parts))
    return ChainedExamples([FirstExamples(part, keeps, max_characters=share) for part in parts])


def _repeating(share: float, keeps: Callable[[Example], bool]) -> Callable[[Example], bool]:
    return lambda example: is_repeated(example, share) and keeps(example)


def _hash_filter(share: float) -> Callable[[Example], bool]:
    """Return a function that tells whether an example is held out, with the probability `share`."""
    limit = int(Fraction(str(share)) * 2**64)
    return lambda example: text_hash(text_of(example)) < limit
