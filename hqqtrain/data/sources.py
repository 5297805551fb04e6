"""Load the examples of `data.source` and `eval.source`, without any text in both.

By default (`eval.source=auto`) the held-out text comes from `data.source`. The standard library is
split by module name, a hub data set has the splits of its authors, and files and folders may be
named after a split. Otherwise a hash of each text decides. `overlap.py` checks that the two parts
share no text.
"""

import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from operator import length_hint
from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.config.data_sources import describe_source, listed_sources, source_paths
from hqqtrain.config.groups import AUTO, BUILT_IN_SOURCES, DataConfig, EvalConfig
from hqqtrain.data.examples import Example
from hqqtrain.data.files import FILE_TYPE_BY_EXTENSION, format_extension
from hqqtrain.data.formats import chat, text
from hqqtrain.data.held_out import FilteredTexts, is_blank, split_by_hash
from hqqtrain.data.mixture import (
    ChainedExamples,
    EpochExamples,
    RepeatedExamples,
    repeats_of_weights,
)
from hqqtrain.data.overlap import check_overlap
from hqqtrain.data.row_examples import RowCounts, RowExamples
from hqqtrain.data.single_source import SourceTexts, open_source
from hqqtrain.data.splits import HELD_OUT_SPLITS, TEST_FIRST

logger = logging.getLogger(__name__)


def load_training_texts(data: DataConfig, evaluation: EvalConfig) -> Iterable[Example]:
    """Load the examples to train on: those of `data.source` that are not held out for `evaluation`.

    Raises:
        UserError: The source cannot be read, contains no text, cannot be split, or overlaps with
            the held-out text.
    """
    where = f"data.source={describe_source(data.source)}"
    texts = open_training_sources(data, held_out_splits=held_out_splits(evaluation))
    if evaluation.source is None:
        return _repeated(texts.train, data)
    if not evaluates_on_training_source(evaluation, data):
        held_out = load_held_out_texts(evaluation, data)
        sources = f"eval.source={evaluation.source}, {where}"
        fix = ", or set eval.source=auto, which holds out a part of data.source"
        check_overlap(texts.train, held_out, sources, fix)
        return _repeated(texts.train, data)
    if texts.held_out is None:
        train, held_out = split_by_hash(texts.train, data.validation, where, logs=False)
        check_overlap(train, held_out, where, fix=None)
        return _repeated(train, data)
    if not _is_built_in(data):  # split by module name; a few short modules are equal
        check_overlap(texts.train, texts.held_out, where, ", or set eval.source to another source")
    return _repeated(texts.train, data)


def load_held_out_texts(evaluation: EvalConfig, data: DataConfig) -> Iterable[Example]:
    """Load the held-out examples, none of which is in `load_training_texts(data, evaluation)`.

    Raises:
        UserError: The source cannot be read, contains no text, or cannot be split.
    """
    assert evaluation.source is not None
    if evaluates_on_training_source(evaluation, data):
        splits = held_out_splits(evaluation)
        texts = open_training_sources(data, warns=False, held_out_splits=splits)
        if texts.held_out is not None:
            if not _is_built_in(data):
                _warn_if_unused(data)
            return texts.held_out
        where = f"data.source={describe_source(data.source)}"
        return split_by_hash(texts.train, data.validation, where)[1]
    # data.file_type describes data.source; a known extension of eval.source takes precedence.
    if format_extension(Path(evaluation.source)) in FILE_TYPE_BY_EXTENSION:
        data = replace(data, file_type=AUTO)
    texts = open_source(
        evaluation.source,
        data,
        "eval.source",
        evaluates=True,
        held_out_splits=held_out_splits(evaluation),
    )
    return texts.train if texts.held_out is None else texts.held_out


def held_out_splits(evaluation: EvalConfig) -> tuple[str, ...]:
    """Return the names of the splits, the first of which that exists is measured."""
    return TEST_FIRST if evaluation.joins_texts else HELD_OUT_SPLITS


def evaluates_on_training_source(evaluation: EvalConfig, data: DataConfig) -> bool:
    """Whether the held-out text is a part of `data.source`."""
    if evaluation.source in (AUTO, data.source):
        return True
    paths = source_paths(data.source)
    if len(paths) > 1 or {evaluation.source, *paths} & set(BUILT_IN_SOURCES):
        return paths == [evaluation.source]
    try:
        return Path(paths[0]).expanduser().samefile(Path(str(evaluation.source)).expanduser())
    except (OSError, ValueError, RuntimeError):  # one of them is no path
        return False


def dataset_name(evaluation: EvalConfig, data: DataConfig) -> str:
    """Return the name of the held-out set for the summary.

    The name of the standard library contains the Python version, which decides its text.
    """
    is_part = evaluates_on_training_source(evaluation, data)
    source = describe_source(data.source) if is_part else str(evaluation.source)
    if source in BUILT_IN_SOURCES:
        return f"{source} {sys.version.split()[0]}, held-out modules"
    return f"{source}, held-out part" if is_part else source


def open_training_sources(
    data: DataConfig, *, warns: bool = True, held_out_splits: Sequence[str] = HELD_OUT_SPLITS
) -> SourceTexts:
    """Open all sources of `data.source`. If some have a held-out split, only that is held out."""
    opened = [
        open_source(path, settings, "data.source", warns=warns, held_out_splits=held_out_splits)
        for path, settings in settings_of_sources(data)
    ]
    if len(opened) == 1:
        return opened[0]
    held_out = [texts.held_out for texts in opened if texts.held_out is not None]
    return SourceTexts(
        ChainedExamples([texts.train for texts in opened]),
        ChainedExamples(held_out) if held_out else None,
    )


def settings_of_sources(data: DataConfig) -> Iterator[tuple[str, DataConfig]]:
    """Yield the path of each source, and the settings that hold for it."""
    for source in listed_sources(data.source):
        own = {name: getattr(source, name) for name in ("format", "file_type", "text_field")}
        yield source.path, replace(data, **{k: value for k, value in own.items() if value})


def _is_built_in(data: DataConfig) -> bool:
    """Whether all sources are built in."""
    return set(source_paths(data.source)) <= set(BUILT_IN_SOURCES)


def _repeated(train: Iterable[Example], data: DataConfig) -> Iterable[Example]:
    """Return the examples to train on, as often as the sources of `data.source` say.

    Raises:
        UserError: A source with a weight has no example to train on.
    """
    sources = listed_sources(data.source)
    repeats = [source.repeats for source in sources]
    weights = [source.weight for source in sources if source.weight is not None]
    if len(sources) == 1 and repeats == [1]:
        return train
    parts = _parts_of(train)
    if len(parts) != len(sources):  # all sources together have a single text, which is cut
        return train
    if weights:
        counts = [sum(not is_blank(example) for example in part) for part in parts]
        if not all(counts):
            empty = sources[counts.index(0)].path
            raise UserError(f"data.source={empty}: has a weight, but nothing to train on.")
        repeats = repeats_of_weights(counts, weights)
    return EpochExamples(
        [
            RepeatedExamples(part, float(number), source.path)
            for part, number, source in zip(parts, repeats, sources, strict=True)
        ],
        number=length_hint(train) if set(repeats) == {1} else 0,
    )


def _parts_of(train: Iterable[Example]) -> Sequence[Iterable[Example]]:
    """Return the examples of each source."""
    if isinstance(train, FilteredTexts):
        return [replace(train, examples=part, number=0) for part in _parts_of(train.examples)]
    return train.parts if isinstance(train, ChainedExamples) else [train]


def source_format(data: DataConfig) -> str:
    """Return the format of the rows of `data.source`, as `chat (messages)`.

    Raises:
        UserError: The source cannot be read, or its rows have no format.
    """
    formats = []
    for path, settings in settings_of_sources(data):
        if path in BUILT_IN_SOURCES:
            formats.append(chat.NAME if path == "python_stdlib_chat" else text.NAME)
            continue
        texts = open_source(path, settings, "data.source", warns=False)
        assert isinstance(texts.train, RowExamples)
        formats.append(texts.train.describe_format())
    return " + ".join(dict.fromkeys(formats))


def count_rows(data: DataConfig) -> RowCounts:
    """Return the numbers of unusual rows of `data.source`, held-out rows included.

    Raises:
        UserError: The source cannot be read, or too many of its rows.
    """
    totals = RowCounts()
    for path, settings in settings_of_sources(data):
        if path in BUILT_IN_SOURCES:
            continue
        rows = open_source(path, settings, "data.source", warns=False).train
        assert isinstance(rows, RowExamples)
        deque(rows, maxlen=0)  # read them all
        totals = RowCounts(*map(sum, zip(totals, rows.counts, strict=True)))
    return totals


def _warn_if_unused(data: DataConfig) -> None:
    """Warn of a value of data.validation that does not decide which text is held out."""
    default = next(f.default for f in fields(DataConfig) if f.name == "validation")
    if data.validation != default:
        logger.warning(
            "data.validation=%s: has no effect, because data.source has a held-out split.",
            data.validation,
        )
