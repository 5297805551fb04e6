"""The figures and samples that task=data shows, on the console and on its page."""

from collections.abc import Sequence
from dataclasses import dataclass

from hqqtrain.common.text import count
from hqqtrain.rundir.schema import DataMetrics

PLAIN_TEXT = (
    "All tokens are trained but the first of each example and of each sequence, so none is marked."
)
"""The legend of samples of plain text."""


@dataclass(frozen=True)
class Piece:
    """Neighboring tokens of a sample, as text.

    Attributes:
        text: The decoded tokens.
        is_trained: Whether the loss predicts them.
        is_special: Whether it is a single token that the tokenizer does not make from the letters
            of ordinary text, such as the end of a turn.
    """

    text: str
    is_trained: bool = False
    is_special: bool = False


@dataclass(frozen=True)
class DataSample:
    """An example as the model gets it.

    Attributes:
        title: Which example it is, and how many tokens it has.
        pieces: Its beginning; the whole of it, if `hidden_tokens` is 0.
        hidden_tokens: Number of tokens that are not shown.
        last_pieces: The pieces after the hidden tokens.
    """

    title: str
    pieces: Sequence[Piece]
    hidden_tokens: int = 0
    last_pieces: Sequence[Piece] = ()

    @property
    def hidden_note(self) -> str:
        return f"... {count(self.hidden_tokens, 'token')} not shown ..."


@dataclass(frozen=True)
class DataView:
    """The data of a run.

    Attributes:
        metrics: The figures, as in summary.json.
        is_plain_text: Whether all tokens but the first of each example are trained.
        samples: Some of the examples.
    """

    metrics: DataMetrics
    is_plain_text: bool
    samples: Sequence[DataSample]

    def figures(self) -> dict[str, str]:
        """Return the figures for people, by name."""
        data = self.metrics
        lengths = data.lengths or {}
        figures = {
            "source": data.source or "",
            "format": data.format or "",
            "examples": f"{data.examples:,}",
            **self._examples_by_source(),
            "exact duplicates": _counted(data.duplicates, data.examples),
            "truncated examples": _counted(data.truncated, data.examples),
            "split examples": _counted(data.split, data.examples),
            "examples in no sequence": _counted(data.dropped, data.examples),
            "examples without a trained token": _counted(data.untrained, data.examples),
            "tokens": f"{data.tokens:,}",
            "trained tokens": _counted(data.trained_tokens, data.tokens),
            "sequences": f"{data.sequences:,} of at most {data.max_seq_len:,} tokens",
            "padding of full-length sequences": percent(data.padding or 0),
            "tokens per example": "min {min:,}, median {median:,}, p95 {p95:,}, max {max:,}".format(
                **lengths
            ),
        }
        for reason, number in (data.left_out or {}).items():
            figures[f"left out: {reason}"] = f"{number:,}"
        if data.empty_answers:
            figures["answers without a word"] = f"{data.empty_answers:,}, only the end is trained"
        if data.held_out:
            kind = "windows" if "windows" in data.held_out else "examples"
            figures[f"held-out {kind}"] = f"{data.held_out[kind]:,}"
            figures["held-out tokens"] = (
                "{tokens:,}, of which an evaluation reads {measured_tokens:,} and predicts "
                "{predicted_tokens:,}".format(**data.held_out)
            )
        return figures

    def _examples_by_source(self) -> dict[str, str]:
        if not self.metrics.sources:
            return {}
        uses = (
            "{used:,} ({examples:,} x {repeats:.4g}) of {source}".format(**s)
            for s in self.metrics.sources
        )
        return {"examples by source": ", ".join(uses)}

    def bars(self) -> list[tuple[str, int]]:
        """Return the histogram of the lengths: `64-127` and the number of examples."""
        return [
            (f"{low:,}" if low == high else f"{low:,}-{high:,}", number)
            for low, high, number in self.metrics.histogram or []
        ]


def percent(share: float) -> str:
    """Return a share as a percentage that is 0 or 100 only if the share is."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{100 * share:.3g} %" if share in (0, 1) else f"{100 * share:.1f} %"


def _counted(number: int | None, total: int | None) -> str:
    return f"{number or 0:,} ({percent((number or 0) / (total or 1))})"
