"""Rows that are tokenized already. They must be tokens of the model's own tokenizer."""

from collections.abc import Collection
from typing import Any

from hqqtrain.data.examples import Tokens
from hqqtrain.data.formats.format import Format, from_json, kind_of
from hqqtrain.data.rows import Row, RowError

NAME, NEEDS = "tokens", "input_ids and maybe labels"

INPUT_IDS, LABELS, MASK, POSITIONS = "input_ids", "labels", "attention_mask", "position_ids"

IGNORE_INDEX = -100
"""The label of a token that is not trained, as in PyTorch."""

_MAX_ID = 2**31 - 1


def match(columns: Collection[str]) -> Format | None:
    """Return the format of rows with these columns; None if they are no tokens."""
    if INPUT_IDS not in columns:
        return None
    others = (name for name in (LABELS, MASK, POSITIONS) if name in columns)
    return Format(NAME, (INPUT_IDS, *others), parse)


def parse(row: Row) -> Tokens:
    """Return the tokens of a row. Without labels, all of them are trained.

    A label has the position of its own token, so it is the token or -100.

    Raises:
        RowError: The row has no tokens, is padded or packed, or has other labels.
    """
    ids = _integers(row, INPUT_IDS)
    if not ids:
        raise RowError(f"{INPUT_IDS} is an empty list")
    for index, token in enumerate(ids):
        if not 0 <= token <= _MAX_ID:
            raise RowError(f"{INPUT_IDS}[{index}] is {token}, which is not a token id")
    labels = ids if row.get(LABELS) is None else _integers(row, LABELS)
    _check_length(labels, ids, LABELS)
    for index, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (token, IGNORE_INDEX):
            raise RowError(
                f"{LABELS}[{index}] is {label}, but {INPUT_IDS}[{index}] is {token}; a label is "
                f"{IGNORE_INDEX} or the token at its own position, not at the next one"
            )
    if row.get(MASK) is not None:
        mask = _integers(row, MASK)
        _check_length(mask, ids, MASK)
        if any(value != 1 for value in mask):
            raise RowError(f"{MASK} is not 1 everywhere; remove the padding from the row")
    if row.get(POSITIONS) is not None and _integers(row, POSITIONS) != tuple(range(len(ids))):
        raise RowError(f"{POSITIONS} does not count from 0; give each text a row of its own")
    return Tokens(ids, labels)


def _integers(row: Row, name: str) -> tuple[int, ...]:
    values: Any = from_json(row.get(name), name)
    if not isinstance(values, list):
        raise RowError(f"{name} is {kind_of(values)}, not a list of integers")
    for index, value in enumerate(values):
        if type(value) is not int:
            raise RowError(f"{name}[{index}] is {kind_of(value)}, not an integer: {value!r:.60}")
    return tuple(values)


def _check_length(values: tuple[int, ...], ids: tuple[int, ...], name: str) -> None:
    if len(values) != len(ids):
        raise RowError(f"{name} has {len(values)} values, but {INPUT_IDS} has {len(ids)}")
