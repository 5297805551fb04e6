"""Recognize the split of a file or of a hub data set's part by its name.

The words are those of Hugging Face `datasets`, so that a folder has the same splits here and there.
Upper and lower case do not matter here, because a missed name would train on held-out text.
"""

import re
from collections.abc import Iterable
from pathlib import Path

TRAIN, VALIDATION, TEST = "train", "validation", "test"

HELD_OUT_SPLITS = (VALIDATION, TEST)
"""The splits that are never trained on; the first that exists is evaluated on."""

_WORDS = {
    VALIDATION: {"validation", "valid", "val", "dev"},
    TEST: {"test", "testing", "eval", "evaluation"},
    TRAIN: {"train", "training"},
}
"""The words that mark a split. A name with words of several splits belongs to the first of them."""

_SEPARATORS = re.compile(r"[-._ 0-9]+")


def split_of_name(name: str) -> str | None:
    """Return the split that a name such as `my-val_01.jsonl` belongs to; None if it has no word."""
    words = set(_SEPARATORS.split(name.lower()))
    return next((split for split, known in _WORDS.items() if words & known), None)


def split_files(files: Iterable[Path], root: Path) -> dict[str | None, list[Path]]:
    """Sort the files below `root` by split; None has the files whose names tell nothing.

    The outermost folder whose name has a split decides; without one, the name of the file does.
    """
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        parts = map(split_of_name, file.relative_to(root).parts)
        splits.setdefault(next(filter(None, parts), None), []).append(file)
    return splits
