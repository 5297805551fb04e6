"""Hold out a part of the examples, by their content.

The content of an example that is no plain text is all its text (`text_of`).
Two texts count as equal if they differ in white space only, so copies of a text stay together.
Near copies may end up in both parts; `overlap.py` finds them.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np

from hqqtrain.common.errors import UserError
from hqqtrain.data.examples import Example, text_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilteredTexts:
    """The examples that `keeps` selects by their text; every iteration filters them again.

    Their number is only for the progress that is shown; 0 if it is unknown.
    """

    examples: Iterable[Example]
    keeps: Callable[[str], bool]
    number: int = 0

    def __length_hint__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Example]:
        return (example for example in self.examples if self.keeps(text_of(example)))


@dataclass(frozen=True)
class ExampleTexts:
    """The text of each example, in order."""

    examples: Iterable[Example]

    def __iter__(self) -> Iterator[str]:
        return map(text_of, self.examples)


def text_hash(text: str) -> int:
    """Return 64 bits of the sha256 of a text without its white space at the ends and runs of it."""
    words = " ".join(text.split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")


def is_blank(example: Example | None) -> bool:
    """Whether an example is missing, or its text has nothing but white space."""
    text = example if isinstance(example, str) or example is None else text_of(example)
    return not text or text.isspace()


def split_by_hash(
    examples: Iterable[Example], share: float, where: str, *, logs: bool = True
) -> tuple[Iterable[Example], Iterable[Example]]:
    """Split examples into those to train on and those to hold out, by the hash of each text.

    The texts with the lowest hashes are held out: `share` of them, and at least one. So the split
    depends neither on the order of the texts nor on the number of ranks, and equal texts are never
    in both parts. The end of a single text is held out. Blank texts are in neither part.

    Args:
        examples: The examples; they are iterated again whenever a part is.
        share: The share of the examples to hold out, above 0 and below 1.
        where: `key=source` for messages.
        logs: Whether to log how many texts are held out.

    Raises:
        UserError: No text is left to train on.
    """
    texts = ExampleTexts(examples)
    hashes = np.fromiter((text_hash(text) for text in texts if not is_blank(text)), np.uint64)
    if len(hashes) == 1:
        single = next(example for example in examples if not is_blank(example))
        return _split_single(single, share, where, logs)
    # Not `ceil(share * n)`: 0.1 * 30 is above 3 in binary fractions.
    count = max(1, ceil(Fraction(str(share)) * len(hashes)))
    threshold = np.sort(hashes)[min(count, len(hashes)) - 1]  # the largest held-out hash
    held_out = int(np.count_nonzero(hashes <= threshold))
    if held_out == len(hashes):
        raise UserError(
            f"{where}: its {len(hashes)} text(s) cannot be split into a training and a held-out "
            "part, because all would be held out; set eval.source to another source, or to null."
        )
    if logs:
        logger.info(
            "%s: %d of %d texts are held out by their hashes (data.validation=%s).",
            where, held_out, len(hashes), share,
        )  # fmt: skip
    return (
        FilteredTexts(
            examples,
            lambda text: not is_blank(text) and text_hash(text) > threshold,
            len(hashes) - held_out,
        ),
        FilteredTexts(
            examples, lambda text: not is_blank(text) and text_hash(text) <= threshold, held_out
        ),
    )


def _split_single(
    text: Example, share: float, where: str, logs: bool
) -> tuple[list[str], list[str]]:
    """Hold out the end of the only text: `share` of its characters, cut at the end of a line."""
    if not isinstance(text, str):
        raise UserError(
            f"{where}: has a single row, which cannot be split into a training and a held-out "
            "part; set eval.source to another source, or to null."
        )
    latest = len(text) - ceil(Fraction(str(share)) * len(text))
    cut = text.rfind("\n", 0, latest) + 1 or text.find("\n") + 1
    train, held_out = text[:cut], text[cut:]
    if is_blank(train) or is_blank(held_out):
        raise UserError(
            f"{where}: its only text has a single line and cannot be split into a training and a "
            "held-out part; set eval.source to another source, or to null."
        )
    if logs:
        logger.info(
            "%s: is a single text; its last %d of %d characters are held out (data.validation=%s).",
            where, len(held_out), len(text), share,
        )  # fmt: skip
    return [train], [held_out]
