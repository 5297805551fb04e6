"""The examples that rows of a data set become, before they are tokenized.

Plain text stays a `str`. The other kinds keep what a row says of the parts that are trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""A message as chat templates read it: `role`, `content`, and for example `tool_calls`."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and the text that continues it; `place` is where the row is, for messages."""

    prompt: str
    completion: str
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a chat.

    Attributes:
        messages: The messages, in order.
        tools: The JSON schemas of the functions that the assistant may call.
        completion_start: Index of the first message of the completion, if the row has a prompt and
            a completion of messages.
        untrained: Indices of assistant messages that the row excludes, as OpenAI's `weight: 0`.
        place: Where the row is, such as `a.jsonl, line 7`, for messages.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    completion_start: int | None = None
    untrained: frozenset[int] = frozenset()
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row that is tokenized already. A label of -100 is not trained; `place` as above."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    place: str = field(default="", compare=False)


Example = str | Completion | Conversation | Tokens


def text_of(example: Example) -> str:
    """Return all text of an example, for its hash and for the search for overlaps."""
    match example:
        case str():
            return example
        case Completion():
            return f"{example.prompt}\n{example.completion}"
        case Conversation():
            return "\n".join(text for message in example.messages for text in _texts(message))
        case Tokens():
            return " ".join(map(str, example.input_ids))


def has_empty_answer(example: Example) -> bool:
    """Whether an example has an answer or completion, but no word in it, so that only its end is
    trained."""
    match example:
        case Completion():
            return not example.completion.strip()
        case Conversation():
            answers = [
                message
                for index, message in enumerate(example.messages)
                if message["role"] == "assistant"
                and index >= (example.completion_start or 0)
                and index not in example.untrained
            ]
            return bool(answers) and not any(text.strip() for text in _texts(answers))
        case _:
            return False


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in the values of a message, but for its role."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "role":
                yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
