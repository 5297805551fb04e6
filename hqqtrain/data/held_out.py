"""Separate held-out texts from training texts by their content.

A perplexity on text that the model was trained on is worthless. Two texts count as equal if they
differ in white space only, so a copy is found whatever its name, its format and its line endings.
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

MAX_OVERLAP = 0.05
"""Largest share of the held-out characters that may also be in the training text, with a warning.

Independent texts share headings and empty forms: below this share the perplexity is still valid.
"""


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
    texts: Iterable[str], share: float, where: str
) -> tuple[Iterable[str], Iterable[str]]:
    """Split texts into those to train on and those to hold out, by the hash of each text.

    The texts with the lowest hashes are held out: `share` of them, and at least one. So the split
    depends neither on the order of the texts nor on the number of ranks, and equal texts are never
    in both parts. The end of a single text is held out. Blank texts are in neither part.

    Args:
        texts: The texts; they are iterated again whenever a part is.
        share: The share of the texts to hold out, above 0 and below 1.
        where: `key=source` for messages.

    Raises:
        UserError: No text is left to train on.
    """
    hashes = np.fromiter((text_hash(text) for text in texts if not is_blank(text)), np.uint64)
    if len(hashes) == 1:
        return _split_single(next(text for text in texts if not is_blank(text)), share, where)
    # Not `ceil(share * n)`: 0.1 * 30 is above 3 in binary fractions.
    count = max(1, ceil(Fraction(str(share)) * len(hashes)))
    threshold = np.sort(hashes)[min(count, len(hashes)) - 1]  # the largest held-out hash
    held_out = int(np.count_nonzero(hashes <= threshold))
    if held_out == len(hashes):
        raise UserError(
            f"{where}: its {len(hashes)} text(s) cannot be split into a training and a held-out "
            "part, because all would be held out; set eval.source to another source, or to null."
        )
    logger.info(
        "%s: %d of %d texts are held out by their hashes (data.validation=%s).",
        where, held_out, len(hashes), share,
    )  # fmt: skip
    return (
        FilteredTexts(texts, lambda text: not is_blank(text) and text_hash(text) > threshold),
        FilteredTexts(texts, lambda text: not is_blank(text) and text_hash(text) <= threshold),
    )


def _split_single(text: str, share: float, where: str) -> tuple[list[str], list[str]]:
    """Hold out the end of the only text: `share` of its characters, cut at the end of a line."""
    latest = len(text) - ceil(Fraction(str(share)) * len(text))
    cut = text.rfind("\n", 0, latest) + 1 or text.find("\n") + 1
    train, held_out = text[:cut], text[cut:]
    if is_blank(train) or is_blank(held_out):
        raise UserError(
            f"{where}: its only text has a single line and cannot be split into a training and a "
            "held-out part; set eval.source to another source, or to null."
        )
    logger.info(
        "%s: is a single text; its last %d of %d characters are held out (data.validation=%s).",
        where, len(held_out), len(text), share,
    )  # fmt: skip
    return [train], [held_out]


def check_overlap(train: Iterable[str], held_out: Iterable[str], where: str, fix: str) -> None:
    """Refuse held-out texts that are also trained on; warn if they are few.

    Args:
        train: The texts to train on.
        held_out: The held-out texts.
        where: The two sources, for messages.
        fix: Further advice for the error message.

    Raises:
        UserError: More than `MAX_OVERLAP` of the held-out characters are in equal training texts.
    """
    sizes, example = {}, {}
    for text in held_out:
        if not is_blank(text):
            key = text_hash(text)
            sizes[key], example[key] = len(text), text[:60]
    shared = {key for text in train if not is_blank(text) and (key := text_hash(text)) in sizes}
    if not shared:
        return
    overlap = sum(sizes[key] for key in shared) / sum(sizes.values())
    largest = max(sorted(shared), key=sizes.__getitem__)
    message = (
        f"{where}: {len(shared)} of {len(sizes)} held-out texts, with {overlap:.1%} of the "
        f"characters, overlaps with the training text, such as {example[largest]!r}"
    )
    if overlap > MAX_OVERLAP:
        raise UserError(
            f"{message}. The model would train on held-out text; remove these texts from one of "
            f"the two{fix}."
        )
    logger.warning("%s; the perplexity is slightly too good.", message)
