"""Mix several sources: examples of some are used more often than those of others in an epoch."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import length_hint

from hqqtrain.data.examples import Example, text_of


@dataclass(frozen=True)
class ChainedExamples:
    """The examples of several sources, one source after the other."""

    parts: Sequence[Iterable[Example]]

    def __length_hint__(self) -> int:
        """Return the number of examples; 0 if that of a source is unknown."""
        numbers = [length_hint(part) for part in self.parts]
        return sum(numbers) if all(numbers) else 0

    def __iter__(self) -> Iterator[Example]:
        for part in self.parts:
            yield from part


@dataclass(frozen=True)
class RepeatedExamples:
    """Examples that are used several times.

    Attributes:
        examples: The examples.
        repeats: How often each is used. A fraction is the share of them that is used once more;
            hashes of their text decide which.
    """

    examples: Iterable[Example]
    repeats: float

    def __length_hint__(self) -> int:
        return round(length_hint(self.examples) * self.repeats)

    def __iter__(self) -> Iterator[Example]:
        whole, share = int(self.repeats), self.repeats % 1
        for _ in range(whole):
            yield from self.examples
        if share:
            yield from (e for e in self.examples if is_repeated(e, share))


def is_repeated(example: Example, share: float) -> bool:
    """Whether an example is in the `share` of all examples that is used once more."""
    return _hash(text_of(example)) < share * 2**64


def repeats_of_weights(counts: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Return how often sources are used, so that their examples are in proportion to weights.

    Each is used at least once, and one of them exactly once.

    Args:
        counts: Number of examples of each source, at least 1.
        weights: Weight of each source.
    """
    rates = [weight / count for count, weight in zip(counts, weights, strict=True)]
    return [rate / min(rates) for rate in rates]


def _hash(text: str) -> int:
    """Return 64 bits of a text, which do not depend on those that decide what is held out."""
    return int.from_bytes(hashlib.sha256(f"repeat {text}".encode()).digest()[:8], "big")
