"""Recognize the split of a file or of a hub data set's part by its name.

The words are those of Hugging Face `datasets`, so that a folder has the same splits here and there.
More spellings are known here, because a missed name would train on held-out text.
"""

import re
from collections.abc import Iterable
from pathlib import Path

TRAIN, VALIDATION, TEST = "train", "validation", "test"

HELD_OUT_SPLITS = (VALIDATION, TEST)
"""The splits that are never trained on; the first that exists is evaluated on."""

TEST_FIRST = (TEST, VALIDATION)
"""The same in another order, for figures that others measure on the test split."""

_WORDS = {
    VALIDATION: "validation|valid|val|dev",
    TEST: "test|testing|eval|evaluation|held-?out|hold-?out",
    TRAIN: "train|training",
}
"""The words that mark a split. A name with words of several splits belongs to the first of them."""

_PATTERNS = {
    split: re.compile(rf"(^|-)({words})(-?(sets?|data|datasets?|split))?(-|$)")
    for split, words in _WORDS.items()
}

_SEPARATORS = re.compile(r"[\W\d_]+")
_CAPITALS = re.compile(r"(?<=[^\W\d_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def split_of_name(name: str) -> str | None:
    """Return the split that a name such as `my-val_01.jsonl` belongs to; None if it has no word.

    Upper and lower case do not matter, but a capital may begin a word, as in `myValSet`.
    """
    spellings = [
        _SEPARATORS.sub("-", spelling.lower()) for spelling in (name, _CAPITALS.sub("-", name))
    ]
    return next(
        (split for split, pattern in _PATTERNS.items() if any(map(pattern.search, spellings))),
        None,
    )


def split_of_path(file: Path, root: Path) -> str | None:
    """Return the split of a file below `root`: of its outermost folder that has one, or of itself.

    The name of `root` does not matter.
    """
    return next(filter(None, map(split_of_name, file.relative_to(root).parts)), None)


def split_files(files: Iterable[Path], root: Path) -> dict[str | None, list[Path]]:
    """Sort the files below `root` by split; None has the files whose names tell nothing."""
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of_path(file, root), []).append(file)
    return splits
