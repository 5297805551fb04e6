"""Prompts and completions, as two texts or as two lists of messages."""

from collections.abc import Collection

from hqqtrain.data.examples import Completion, Conversation
from hqqtrain.data.formats.chat import parse_messages
from hqqtrain.data.formats.format import Format, check_text, kind_of
from hqqtrain.data.formats.tool_calls import TOOL_COLUMNS, parse_tools
from hqqtrain.data.rows import Row, RowError

NAME, NEEDS = "completion", "prompt and completion, as texts or as lists of messages"

PROMPT, COMPLETION = "prompt", "completion"


def match(columns: Collection[str]) -> Format | None:
    """Return the format of rows with these columns; None if they are no completions."""
    if not {PROMPT, COMPLETION} <= set(columns):
        return None
    others = (name for name in TOOL_COLUMNS if name in columns)
    return Format(NAME, (PROMPT, COMPLETION, *others), parse)


def parse(row: Row) -> Completion | Conversation:
    """Return a completion if both columns are texts, and a conversation if both are messages.

    Raises:
        RowError: The row does not fit.
    """
    prompt, completion = row.get(PROMPT), row.get(COMPLETION)
    if isinstance(prompt, list | dict) and isinstance(completion, list | dict):
        before, _ = parse_messages(prompt, PROMPT)
        after, excluded = parse_messages(completion, COMPLETION)
        start = len(before)
        untrained = frozenset(start + index for index in excluded)
        return Conversation(before + after, parse_tools(row), start, untrained)
    if isinstance(prompt, list | dict) or isinstance(completion, list | dict):
        raise RowError(
            f"{PROMPT} is {kind_of(prompt)} and {COMPLETION} is {kind_of(completion)}; both must "
            "be texts, or lists of messages"
        )
    return Completion(check_text(prompt, PROMPT), check_text(completion, COMPLETION))
