"""The text of examples, which decides what counts as the same text."""

import pytest

from hqqtrain.data.examples import Completion, Conversation, Tokens, text_of

MESSAGES = (
    {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "look", "arguments": {"where": "here"}}}],
    },
)


@pytest.mark.parametrize(
    ("example", "parts"),
    [
        ("plain", ["plain"]),
        (Completion("Q", "A"), ["Q", "A"]),
        (Conversation(MESSAGES), ["What is it?", "look", "here"]),
        (Tokens((1, 2), (-100, 2)), ["1 2"]),
    ],
)
def test_the_text_has_every_part(example, parts: list[str]):
    text = text_of(example)
    assert all(part in text for part in parts)
    assert "assistant" not in text
