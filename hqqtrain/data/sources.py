"""From `data.source` and `eval.source` to texts, and never the same text in both.

A figure measured on text that was trained on is worthless, so the split belongs to the
source: the standard library is split by module name, a hub data set by its authors' own
splits, and anything else that both keys name by the hash of each text. A path of one inside
the other is refused.
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
from hqqtrain.data.files import ENDINGS, read_files
from hqqtrain.data.hub import has_held_out, hub_split, load_hub
from hqqtrain.data.stdlib import stdlib_texts

STDLIB = "python_stdlib"

HASHED_SHARE = 20
"""One text in this many is held out where eval.source is data.source and has no split."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def training_texts(data: DataConfig, evaluation: EvalConfig) -> Sequence[str]:
    """The texts to train on: all of `data.source` but what `evaluation` measures on."""
    _refuse_overlap(data, evaluation)
    texts, is_split = load_texts(data, "train")
    return texts if is_split or evaluation.source != data.source else split_by_hash(texts, data)[0]


def held_out_texts(evaluation: EvalConfig, data: DataConfig) -> Sequence[str]:
    """The texts to measure on: none of them is among `training_texts(data, evaluation)`."""
    _refuse_overlap(data, evaluation)
    if evaluation.source == data.source:
        texts, is_split = load_texts(data, "held_out", key="eval.source")
        return texts if is_split else split_by_hash(texts, data)[1]
    assert evaluation.source is not None
    known = Path(evaluation.source).suffix.lower() in ENDINGS
    config = replace(data, source=evaluation.source, format="auto" if known else data.format)
    return load_texts(config, "held_out", key="eval.source")[0]


def load_texts(
    data: DataConfig, split: str, *, key: str = "data.source"
) -> tuple[Sequence[str], bool]:
    """(texts, whether the source itself keeps `split` apart from the other one).

    `split` is `train` or `held_out`; where the source knows no such split, all its texts.
    The texts of a file or a data set stay on disk until they are read. Raises UserError, with
    `key` as the name of the key that holds `data.source`.
    """
    if data.source == STDLIB:
        return [text for _, text in stdlib_texts(split)], True
    if not _is_hub_name(data.source):
        rows = read_files(data.source, data.format, data.text_field, key)
        return _column(rows, data.text_field, data.source, key), False
    splits = load_hub(data.source, key)
    rows = hub_split(splits, split, data.source, key)
    return _column(rows, data.text_field, data.source, key), has_held_out(splits)


def split_by_hash(texts: Sequence[str], data: DataConfig) -> tuple[list[str], list[str]]:
    """(train, held out): one text in `HASHED_SHARE` goes to the second, at least one.

    The lowest hashes are held out; texts that are equal stay together.
    """
    kept = [
        (hashlib.sha256(text.encode()).digest(), text) for text in texts if text and text.strip()
    ]
    ranked = sorted(digest for digest, _ in kept)
    limit = ranked[(len(ranked) - 1) // HASHED_SHARE]
    train = [text for digest, text in kept if digest > limit]
    if not train:
        raise UserError(
            f"eval.source={data.source}: is data.source too, and its {len(kept)} text(s) cannot "
            "be split into some to train on and others to measure on; give eval.source another."
        )
    return train, [text for digest, text in kept if digest <= limit]


def dataset_name(evaluation: EvalConfig, data: DataConfig) -> str:
    """What a perplexity was measured on, for the summary: it changes with Python's version."""
    if evaluation.source == STDLIB:
        return f"python_stdlib {sys.version.split()[0]}, held-out modules"
    return (
        f"{evaluation.source}, held-out part"
        if evaluation.source == data.source
        else str(evaluation.source)
    )


def _refuse_overlap(data: DataConfig, evaluation: EvalConfig) -> None:
    if evaluation.source in (None, data.source):
        return
    one, other = Path(data.source), Path(str(evaluation.source))
    if not (one.exists() and other.exists()):
        return
    one, other = one.resolve(), other.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UserError(
            f"eval.source={evaluation.source}: overlaps with data.source={data.source}, so "
            "training would see what is measured; move it out, or name the same path in both: "
            f"then one text in {HASHED_SHARE} is held out."
        )


def _is_hub_name(source: str) -> bool:
    """False for what exists here and for what only a path can be."""
    path = Path(source).expanduser()
    if path.exists() or path.suffix.lower() in ENDINGS or not _HUB_NAME.fullmatch(source):
        return False
    return path.parent == Path() or not path.parent.exists()


def _column(rows: datasets.Dataset, field: str, source: str, key: str) -> Sequence[str]:
    """The column of texts, read lazily; a UserError where it is not there or holds no text."""
    columns = rows.column_names
    if field not in columns:
        raise UserError(
            f"data.text_field={field}: {key}={source} has no such column; it has "
            f"{', '.join(columns)}."
        )
    feature = rows.features[field]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise UserError(f"data.text_field={field}: holds {feature}, not text, in {key}={source}.")
    texts = rows[field]
    if not any(text and text.strip() for text in texts):
        raise UserError(f"{key}={source}: no text in it; every row of '{field}' is empty.")
    return texts
