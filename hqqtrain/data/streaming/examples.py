"""An endless stream of examples: pass after pass over one or several sources.

Sources without weights follow each other in each pass. Sources with weights are mixed at random,
and each begins again at its own end. The stream can begin at any place that it has returned, so a
resumed run continues where it was; which source gives an example depends only on the number of
examples before it.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

from hqqtrain.common.errors import UserError
from hqqtrain.data.examples import Example
from hqqtrain.data.held_out import is_blank
from hqqtrain.data.row_examples import Position, RowExamples


@dataclass(frozen=True)
class StreamPart:
    """Examples that can be read from any position on, and which of them are used.

    Attributes:
        examples: The examples of a source.
        keeps: Whether an example is used.
    """

    examples: Iterable[Example]
    keeps: Callable[[Example], bool] = lambda example: True

    @property
    def is_plain_text(self) -> bool:
        if isinstance(self.examples, RowExamples):
            return self.examples.is_plain_text
        return isinstance(next(iter(self.examples), ""), str)

    def read(self, start: Position) -> Iterator[tuple[Position, Example]]:
        """Yield the used examples after a position, each with the position after it."""
        if isinstance(self.examples, RowExamples):
            found = self.examples.read(start)
        else:
            rest = islice(self.examples, start.row, None)
            found = ((Position(0, n), example) for n, example in enumerate(rest, start.row + 1))
        return (
            (position, example)
            for position, example in found
            if not (isinstance(example, str) and is_blank(example)) and self.keeps(example)
        )


class Place(NamedTuple):
    """A place in an endless reading of several parts.

    Attributes:
        passes: Number of complete passes before it.
        part: Index of the part.
        file: The position in the part, as the next two; see `Position`.
    """

    passes: int = 0
    part: int = 0
    file: int = 0
    row: int = 0
    bad_rows: int = 0


class StreamPlace(NamedTuple):
    """A place in an `ExampleStream`: the number of examples before it, and the place per source."""

    examples: int
    places: tuple[Place, ...]

    @property
    def passes(self) -> int:
        """Number of passes over all sources."""
        return min(place.passes for place in self.places)


@dataclass(frozen=True)
class StreamSource:
    """Parts that follow each other in each pass.

    Attributes:
        name: `key=source`, for messages.
        parts: The parts; several if sources have no weights, or if one is repeated.
        weight: Share of the examples, relative to the other sources of the stream.
    """

    name: str
    parts: Sequence[StreamPart]
    weight: float = 1.0

    def read(self, start: Place) -> Iterator[tuple[Place, Example]]:
        """Yield examples without end, from a place on, each with the place after it.

        Raises:
            UserError: A pass has no example, or the source cannot be read.
        """
        place, has_examples = start, start != Place()
        while True:
            for part in range(place.part, len(self.parts)):
                begin = Position(*place[2:]) if part == place.part else Position()
                for position, example in self.parts[part].read(begin):
                    has_examples = True
                    yield Place(place.passes, part, *position), example
            if not has_examples:
                raise UserError(
                    f"{self.name}: has no example to train on; all are empty or held out "
                    "(data.validation)."
                )
            place, has_examples = Place(place.passes + 1), False


class ExampleStream:
    """The examples of several sources, mixed at random by their weights, without end.

    Args:
        sources: The sources.
        seed: Seed of the mixture.
    """

    def __init__(self, sources: Sequence[StreamSource], seed: int = 0) -> None:
        self._sources, self._seed = sources, seed
        self._bounds = list(accumulate(source.weight for source in sources))

    @property
    def is_plain_text(self) -> bool:
        """Whether all examples are plain texts."""
        return all(part.is_plain_text for source in self._sources for part in source.parts)

    @property
    def files(self) -> list[Path]:
        """The files of the sources, in the order in which they are read."""
        parts = [part for source in self._sources for part in source.parts]
        read = [part.examples.files for part in parts if isinstance(part.examples, RowExamples)]
        return [file for files in read for file in files]

    @property
    def has_passes(self) -> bool:
        """Whether a pass over all examples has an end; sources with weights end by themselves."""
        return len(self._sources) == 1

    def start(self) -> StreamPlace:
        """Return the place before the first example."""
        return StreamPlace(0, (Place(),) * len(self._sources))

    def first_pass(self) -> "FirstPass":
        """Return the examples until all sources have begun again."""
        return FirstPass(self)

    def read(self, start: StreamPlace) -> Iterator[tuple[StreamPlace, Example]]:
        """Yield examples without end, from a place on, each with the place after it.

        Raises:
            UserError: A source has no example to train on, or cannot be read.
        """
        places = list(start.places)
        readers = [source.read(place) for source, place in zip(self._sources, places, strict=True)]
        number = start.examples
        while True:
            source = self._choose(number)
            places[source], example = next(readers[source])
            number += 1
            yield StreamPlace(number, tuple(places)), example

    def _choose(self, number: int) -> int:
        """Return the index of the source of the example of a number from 0."""
        if len(self._sources) == 1:
            return 0
        digest = hashlib.blake2b(f"{self._seed} {number}".encode(), digest_size=7).digest()
        share = int.from_bytes(digest, "big") / 2**56  # below 1, and exact
        return bisect_right(self._bounds, share * self._bounds[-1], hi=len(self._bounds) - 1)


@dataclass(frozen=True)
class FirstPass:
    """The examples of a stream until all sources have begun again; every iteration reads them."""

    stream: ExampleStream

    def __iter__(self) -> Iterator[Example]:
        for place, example in self.stream.read(self.stream.start()):
            if place.passes:
                return
            yield example
