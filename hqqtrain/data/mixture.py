"""Mix several sources: examples of some are used more often than those of others in an epoch."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import length_hint

from hqqtrain.data.examples import Example, text_of
from hqqtrain.data.held_out import is_blank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceUse:
    """How an epoch uses a source.

    Attributes:
        source: The path or name of the source.
        examples: Number of its examples, but for those that are held out.
        repeats: How often each is used; see `RepeatedExamples`.
        used: Number of examples in an epoch that come from it.
    """

    source: str
    examples: int
    repeats: float
    used: int

    def __str__(self) -> str:
        return f"{self.used:,} ({self.examples:,} x {self.repeats:.4g}) of {self.source}"


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


class RepeatedExamples:
    """Examples that are used several times.

    Args:
        examples: The examples.
        repeats: How often each is used. A fraction is the share of them that is used once more;
            hashes of their text decide which.
        source: The path or name of their source.

    Attributes:
        use: What the last iteration over all examples has counted. Blank texts do not count.
    """

    def __init__(self, examples: Iterable[Example], repeats: float, source: str = "") -> None:
        self._examples = examples
        self.use = SourceUse(source, 0, repeats, 0)

    def __length_hint__(self) -> int:
        return round(length_hint(self._examples) * self.use.repeats)

    def __iter__(self) -> Iterator[Example]:
        whole, share = int(self.use.repeats), self.use.repeats % 1
        examples = used = 0
        for number in range(whole + (share > 0)):
            for example in self._examples:
                is_used = number < whole or is_repeated(example, share)
                if is_used:
                    yield example
                if not (isinstance(example, str) and is_blank(example)):
                    examples += number == 0
                    used += is_used
        self.use = replace(self.use, examples=examples, used=used)


@dataclass(frozen=True)
class EpochExamples(ChainedExamples):
    """The examples of an epoch. The log says how often each source is used, once all are read.

    Their number is only for the progress that is shown; 0: it is that of the parts, if known.
    """

    parts: Sequence[RepeatedExamples]
    number: int = 0

    def __length_hint__(self) -> int:
        return self.number or super().__length_hint__()

    def __iter__(self) -> Iterator[Example]:
        yield from super().__iter__()
        uses = ", ".join(map(str, self.uses()))
        logger.info("data.source: the examples of an epoch are %s", uses)

    def uses(self) -> list[SourceUse]:
        """Return how each source was used in the last iteration over all examples."""
        return [part.use for part in self.parts]


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
