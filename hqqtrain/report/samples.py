"""Samples of text: how each model of a run continues held-out texts, or answers held-out chats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hqqtrain.report.html import render_section
from hqqtrain.report.text import escape_html


@dataclass(frozen=True)
class Sample:
    """A beginning of held-out text, and its continuations.

    Attributes:
        prompt: The beginning.
        continuations: Source of the continuation -> text. The sources are `held-out text` and the
            values of `MODEL_NAMES`.
        is_chat: Whether the continuations are replies of the assistant.
    """

    prompt: str
    continuations: Mapping[str, str]
    is_chat: bool = False


def render_samples(samples: Sequence[Sample]) -> str:
    """Return a section with the samples; empty without samples."""
    if not samples:
        return ""
    blocks = []
    for sample in samples:
        columns = (
            f"<div><h3>{escape_html(name)}</h3><pre>{escape_html(text)}</pre></div>"
            for name, text in sample.continuations.items()
        )
        prompt = f"<h3>prompt</h3><pre>{escape_html(sample.prompt)}</pre>"
        blocks.append(f'{prompt}<div class="samples">{"".join(columns)}</div>')
    what = "Replies to held-out chats" if samples[0].is_chat else "Continuations of held-out text"
    return render_section(f"{what}, most likely tokens", "<hr>".join(blocks))
