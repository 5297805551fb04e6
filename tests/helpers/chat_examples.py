"""One example of each kind that is not plain text."""

from hqqtrain.data.examples import Completion, Conversation, Tokens

CHAT = Conversation(
    (
        {"role": "user", "content": "Which word?"},
        {"role": "assistant", "content": "This one."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "That one."},
    )
)
PAIR = Conversation(CHAT.messages, completion_start=3)
COMPLETION = Completion("def add(a, b):", "\n    return a + b")
TOKENS = Tokens((5, 6, 7, 8), (-100, 6, -100, 8))
