"""Hold out a part of the texts, by their content.

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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilteredTexts:
    """The texts that `keeps` selects; every iteration filters them again."""

    texts: Iterable[str]
    keeps: Callable[[str], bool]

    def __iter__(self) -> Iterator[str]:
        return filter(self.keeps, self.texts)


def text_hash(text: str) -> int:
    """Return 64 bits of the sha256 of a text without its white space at the ends and runs of it."""
    words = " ".join(text.split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")


def is_blank(text: str | None) -> bool:
    """Whether a text is missing or has nothing but white space."""
    return not text or text.isspace()


def split_by_hash(
    texts: Iterable[str], share: float, where: str, *, logs: bool = True
) -> tuple[Iterable[str], Iterable[str]]:
    """Split texts into those to train on and those to hold out, by the hash of each text.

    The texts with the lowest hashes are held out: `share` of them, and at least one. So the split
    depends neither on the order of the texts nor on the number of ranks, and equal texts are never
    in both parts. The end of a single text is held out. Blank texts are in neither part.

    Args:
        texts: The texts; they are iterated again whenever a part is.
        share: The share of the texts to hold out, above 0 and below 1.
        where: `key=source` for messages.
        logs: Whether to log how many texts are held out.

    Raises:
        UserError: No text is left to train on.
    """
    hashes = np.fromiter((text_hash(text) for text in texts if not is_blank(text)), np.uint64)
    if len(hashes) == 1:
        return _split_single(next(text for text in texts if not is_blank(text)), share, where, logs)
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
        FilteredTexts(texts, lambda text: not is_blank(text) and text_hash(text) > threshold),
        FilteredTexts(texts, lambda text: not is_blank(text) and text_hash(text) <= threshold),
    )


def _split_single(text: str, share: float, where: str, logs: bool) -> tuple[list[str], list[str]]:
    """Hold out the end of the only text: `share` of its characters, cut at the end of a line."""
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
