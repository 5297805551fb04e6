"""Load the texts of `data.source` and `eval.source`, without any text in both.

A perplexity on text that the model was trained on is worthless. How the two sets are separated
depends on the source. The standard library is split by module name, and a hub data set has the
splits of its authors. If both keys name any other source, the hash of each text decides. A run is
refused if the path of one key is inside that of the other key.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.files import FORMAT_BY_EXTENSION, read_files
from hqqtrain.data.hub import has_held_out, load_hub_dataset, select_hub_split
from hqqtrain.data.stdlib import stdlib_texts

STDLIB = "python_stdlib"

TEXTS_PER_HELD_OUT = 20
"""One text in this many is held out if eval.source equals data.source and has no splits."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def load_training_texts(data: DataConfig, evaluation: EvalConfig) -> Sequence[str]:
    """Load the texts to train on: those of `data.source` that are not held out for `evaluation`.

    Raises:
        UserError: The source cannot be read, contains no text, cannot be split, or overlaps with
            eval.source.
    """
    _refuse_overlap(data, evaluation)
    texts, is_split = load_texts(data, "train")
    if is_split or evaluation.source != data.source:
        return texts
    return split_by_hash(texts, data)[0]


def load_held_out_texts(evaluation: EvalConfig, data: DataConfig) -> Sequence[str]:
    """Load the held-out texts, none of which is in `load_training_texts(data, evaluation)`.

    Raises:
        UserError: The source cannot be read, contains no text, cannot be split, or overlaps with
            data.source.
    """
    _refuse_overlap(data, evaluation)
    if evaluation.source == data.source:
        texts, is_split = load_texts(data, "held_out", key="eval.source")
        return texts if is_split else split_by_hash(texts, data)[1]
    assert evaluation.source is not None
    # data.format describes data.source; a known extension of eval.source takes precedence.
    has_known_extension = Path(evaluation.source).suffix.lower() in FORMAT_BY_EXTENSION
    format = "auto" if has_known_extension else data.format
    held_out = replace(data, source=evaluation.source, format=format)
    return load_texts(held_out, "held_out", key="eval.source")[0]


def load_texts(
    data: DataConfig, split: str, *, key: str = "data.source"
) -> tuple[Sequence[str], bool]:
    """Load the texts of one split of `data.source`.

    Args:
        data: The group `data` of the configuration.
        split: `train` or `held_out`. All texts of a source without splits are loaded.
        key: The config key that contains `data.source`, for messages.

    Returns:
        The texts, and whether the source itself has both splits. The texts of a file or a data set
        are read from disk lazily.

    Raises:
        UserError: The source cannot be read or contains no text.
    """
    if data.source == STDLIB:
        return [text for _, text in stdlib_texts(split)], True
    if not _is_hub_name(data.source):
        rows = read_files(data.source, data.format, data.text_field, key)
        return _column(rows, data.text_field, data.source, key), False
    splits = load_hub_dataset(data.source, key)
    rows = select_hub_split(splits, split, data.source, key)
    return _column(rows, data.text_field, data.source, key), has_held_out(splits)


def split_by_hash(texts: Sequence[str], data: DataConfig) -> tuple[list[str], list[str]]:
    """Split texts into those to train on and those to hold out, by the hash of each text.

    The texts with the lowest hashes are held out: one in `TEXTS_PER_HELD_OUT`, and at least one.
    Equal texts have equal hashes, so they are never in both parts. Blank texts are in neither.

    Raises:
        UserError: No text is left to train on.
    """
    hashed = [
        (hashlib.sha256(text.encode()).digest(), text) for text in texts if text and text.strip()
    ]
    ranked = sorted(digest for digest, _ in hashed)
    threshold = ranked[(len(ranked) - 1) // TEXTS_PER_HELD_OUT]  # the largest held-out hash
    train = [text for digest, text in hashed if digest > threshold]
    if not train:
        raise UserError(
            f"eval.source={data.source}: equals data.source, and its {len(hashed)} text(s) cannot "
            "be split into a training and a held-out part; set eval.source to another source."
        )
    return train, [text for digest, text in hashed if digest <= threshold]


def dataset_name(evaluation: EvalConfig, data: DataConfig) -> str:
    """Return the name of the held-out set for the summary.

    The name of the standard library contains the Python version, which decides its text.
    """
    if evaluation.source == STDLIB:
        return f"python_stdlib {sys.version.split()[0]}, held-out modules"
    if evaluation.source == data.source:
        return f"{evaluation.source}, held-out part"
    return str(evaluation.source)


def _refuse_overlap(data: DataConfig, evaluation: EvalConfig) -> None:
    """Raise UserError if the path of one source contains that of the other."""
    if evaluation.source in (None, data.source):
        return
    training, held_out = Path(data.source), Path(str(evaluation.source))
    if not (training.exists() and held_out.exists()):
        return
    training, held_out = training.resolve(), held_out.resolve()
    if training.is_relative_to(held_out) or held_out.is_relative_to(training):
        raise UserError(
            f"eval.source={evaluation.source}: overlaps with data.source={data.source}, so "
            "the model would train on held-out text; move one of them, or set both keys to the "
            f"same path: then one text in {TEXTS_PER_HELD_OUT} is held out."
        )


def _is_hub_name(source: str) -> bool:
    """Whether `source` is the name of a hub data set: neither an existing path nor like a path.

    A source is like a path if it has the extension of a text file, or if its folder exists.
    """
    path = Path(source).expanduser()
    has_known_extension = path.suffix.lower() in FORMAT_BY_EXTENSION
    if path.exists() or has_known_extension or not _HUB_NAME.fullmatch(source):
        return False
    return path.parent == Path() or not path.parent.exists()


def _column(rows: datasets.Dataset, field: str, source: str, key: str) -> Sequence[str]:
    """Return the column `field` of `rows`, which is read lazily.

    Raises:
        UserError: The column does not exist or contains no text.
    """
    columns = rows.column_names
    if field not in columns:
        raise UserError(
            f"data.text_field={field}: {key}={source} has no such column; it has "
            f"{', '.join(columns)}."
        )
    feature = rows.features[field]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise UserError(
            f"data.text_field={field}: contains {feature}, not text, in {key}={source}."
        )
    texts = rows[field]
    if not any(text and text.strip() for text in texts):
        raise UserError(f"{key}={source}: no text in it; every row of '{field}' is empty.")
    return texts
