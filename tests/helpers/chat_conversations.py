"""The conversations of the table of chat templates; no text in them is a marker of a template."""

import json
from typing import Any

Message = dict[str, Any]
Conversation = tuple[list[Message], list[dict[str, Any]] | None]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city."}},
            "required": ["city"],
        },
    },
}
SYSTEM = {"role": "system", "content": "Answer in a few words."}
ASK_1 = {"role": "user", "content": "Which mountain is highest?"}
ASK_2 = {"role": "user", "content": "How high is that one?"}
ASK_3 = {"role": "user", "content": "Thanks, goodbye."}
ANSWER_1 = {"role": "assistant", "content": "Everest, in the Himalayas."}
ANSWER_2 = {"role": "assistant", "content": "It rises 8849 meters."}
ANSWER_3 = {"role": "assistant", "content": "Farewell!"}
ASK_WEATHER = {"role": "user", "content": "Do I need an umbrella today?"}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def call(number: int, city: str, as_json: bool = False) -> dict[str, Any]:
    """A tool call; Mistral's templates want nine letters and digits in its id."""
    arguments = {"city": city}
    function = {"name": "get_weather", "arguments": json.dumps(arguments) if as_json else arguments}
    return {"id": f"callid00{number}", "type": "function", "function": function}


def result(number: int, content: str) -> Message:
    identity = {"tool_call_id": f"callid00{number}", "name": "get_weather"}
    return {"role": "tool", "content": content, **identity}


def thinking(message: Message, thought: str) -> Message:
    return {**message, "reasoning_content": thought}


def tagged(message: Message, thought: str) -> Message:
    return {**message, "content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}


HEIGHT, SURVEY = "Height above the sea counts.", "The survey of 2020."
RAIN, SUN = "rain all day", "bright sunshine"
TAKE = assistant("Take one, it will pour.")

ROW_BY_NAME: dict[str, list[Message]] = {
    "one": [ASK_1, ANSWER_1],
    "system": [SYSTEM, ASK_1, ANSWER_1],
    "turns": [ASK_1, ANSWER_1, ASK_2, ANSWER_2, ASK_3, ANSWER_3],
    "system_turns": [SYSTEM, ASK_1, ANSWER_1, ASK_2, ANSWER_2],
    "repeated": [user("Yes."), assistant("Yes."), user("Yes."), assistant("Yes.")],
    "padded": [
        user("  Which one? \n"),
        assistant("\n  Everest, of course. \n\n"),
        ASK_2,
        assistant(" About nine kilometers.\n"),
    ],
    "unicode": [
        user("Wie heißt der höchste Berg? 🏔️"),
        assistant("珠穆朗玛峰 — Чомолунгма, एवरेस्ट 🏔️"),
        user("E\u0301 ou é\u00a0?"),
        assistant("Dvě možnosti: e\u0301\u200d, é…"),
    ],
    "lines": [ASK_1, assistant("First:\n\n- one\n- two\n\n\nLast."), ASK_2, ANSWER_2],
    "empty_first": [ASK_1, assistant(""), ASK_2, ANSWER_2],
    "empty_last": [ASK_1, ANSWER_1, ASK_2, assistant("")],
    "thinking_one": [ASK_1, thinking(ANSWER_1, HEIGHT)],
    "thinking": [ASK_1, thinking(ANSWER_1, HEIGHT), ASK_2, thinking(ANSWER_2, SURVEY)],
    "thinking_last": [ASK_1, ANSWER_1, ASK_2, thinking(ANSWER_2, SURVEY)],
    "think_tags": [ASK_1, tagged(ANSWER_1, HEIGHT), ASK_2, tagged(ANSWER_2, SURVEY)],
    "tools": [
        ASK_WEATHER,
        assistant("", tool_calls=[call(1, "Oslo")]),
        result(1, RAIN),
        TAKE,
        ASK_2,
        ANSWER_2,
    ],
    "tools_null": [
        ASK_WEATHER,
        assistant(None, tool_calls=[call(1, "Oslo")]),
        result(1, RAIN),
        TAKE,
    ],
    "tools_json": [  # OpenAI's form: arguments as a string, and no content
        ASK_WEATHER,
        assistant(None, tool_calls=[call(1, "Oslo", as_json=True)]),
        result(1, RAIN),
        TAKE,
    ],
    "tools_text": [
        ASK_WEATHER,
        assistant("Let me look.", tool_calls=[call(1, "Oslo")]),
        result(1, RAIN),
        TAKE,
    ],
    "tools_parallel": [
        ASK_WEATHER,
        assistant("", tool_calls=[call(1, "Oslo"), call(2, "Bern")]),
        result(1, RAIN),
        result(2, SUN),
        TAKE,
    ],
    "tools_twice": [
        SYSTEM,
        ASK_WEATHER,
        assistant("", tool_calls=[call(1, "Oslo")]),
        result(1, RAIN),
        assistant("", tool_calls=[call(2, "Bern")]),
        result(2, SUN),
        TAKE,
    ],
    "thinking_tools": [
        ASK_WEATHER,
        thinking(assistant("", tool_calls=[call(1, "Oslo")]), "I need the weather."),
        result(1, RAIN),
        thinking(TAKE, "Rain means an umbrella."),
        ASK_2,
        thinking(ANSWER_2, SURVEY),
    ],
}
CONVERSATIONS: dict[str, Conversation] = {
    name: (row, [WEATHER] if "tools" in name else None) for name, row in ROW_BY_NAME.items()
}


def texts_of(conversations: dict[str, Conversation]) -> list[str]:
    """Return every content and thought, to train a tokenizer on."""
    messages = [message for row, _ in conversations.values() for message in row]
    fields = (m.get(key) for m in messages for key in ("content", "reasoning_content"))
    return [text for text in fields if text]
