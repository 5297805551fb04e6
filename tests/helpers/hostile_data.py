"""Hostile and broken texts to train and evaluate on."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostile import Case, Inputs, nested, sample_text

TEXTS = [sample_text(seed) for seed in range(3, 9)]


def _file(name: str, content: str | bytes, *words: str) -> Callable[[Inputs], list[str]]:
    """Return what writes `data.source`."""

    def make(inputs: Inputs) -> list[str]:
        path = inputs.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return [f"data.source={path}", *words]

    return make


def _lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _folder(fill: Callable[[Path], object]) -> Callable[[Inputs], list[str]]:
    def make(inputs: Inputs) -> list[str]:
        path = inputs.folder / "data"
        path.mkdir()
        fill(path)
        return [f"data.source={path}"]

    return make


def _pipe(inputs: Inputs) -> list[str]:
    os.mkfifo(inputs.folder / "pipe.txt")
    return [f"data.source={inputs.folder / 'pipe.txt'}"]


def _trained_on(inputs: Inputs) -> list[str]:
    """Return a command that trains on its held-out text."""
    return [f"data.source={inputs.prepared / 'held_out.txt'}"]


def _link_loop(inputs: Inputs) -> list[str]:
    path = inputs.folder / "loop.txt"
    path.symlink_to(path)
    return [f"data.source={path}"]


ROWS = [{"text": text} for text in TEXTS]

CASES = {
    "missing": Case(["data.source=./nowhere.txt"], ("data.source", "nowhere.txt")),
    "no name": Case(["data.source=''"], ("data.source",)),
    "empty text": Case(_file("a.txt", ""), ("a.txt",)),
    "empty lines": Case(_file("a.txt", " \n\t\n" * 100), ("a.txt",)),
    "empty JSON Lines": Case(_file("a.jsonl", ""), ("a.jsonl",)),
    "bytes": Case(_file("a.txt", bytes(range(128, 256)) * 50), ("a.txt",)),
    "a cut row": Case(_file("a.jsonl", _lines(*ROWS) + '{"text": "cut'), ("a.jsonl", "7")),
    "a row that is a list": Case(_file("a.jsonl", _lines(*ROWS, [1])), ("a.jsonl", "7")),
    "a row without the field": Case(_file("a.jsonl", _lines(*ROWS, {"body": "x"}))),
    "another field": Case(_file("a.jsonl", _lines({"body": "x"})), ("data.text_field", "body")),
    "a field of numbers": Case(_file("a.jsonl", _lines({"text": 5})), ("a.jsonl", "text")),
    "a nested row": Case(_file("a.jsonl", '{"text": ' + nested() + "}\n"), ("a.jsonl",)),
    "another column changes its type": Case(
        _file("a.jsonl", _lines(*({**row, "id": i or None} for i, row in enumerate(ROWS)),
                                {**ROWS[0], "id": "seven"}))
    ),
    "BOM before JSON": Case(_file("a.jsonl", b"\xef\xbb\xbf" + _lines(*ROWS).encode())),
    "BOM before text": Case(_file("a.txt", b"\xef\xbb\xbf" + TEXTS[0].encode())),
    "CRLF": Case(_file("a.jsonl", _lines(*ROWS).replace("\n", "\r\n"))),
    "UTF-16": Case(_file("a.txt", TEXTS[0].encode("utf-16"))),
    "NUL": Case(_file("a.txt", TEXTS[0] + "\0" * 100 + TEXTS[1])),
    "one line of 4 MB": Case(_file("a.txt", "word " * 800_000)),
    "an empty folder": Case(_folder(lambda path: None), ("data",)),
    "a folder of hidden files": Case(
        _folder(lambda path: (path / ".a.txt").write_text(TEXTS[0])), ("data",)
    ),
    "parquet that is none": Case(_file("a.parquet", "garbage"), ("a.parquet",)),
    "gzip that is none": Case(_file("a.jsonl.gz", "garbage"), ("a.jsonl.gz",)),
    "a pipe": Case(_pipe, ("pipe.txt",)),
    "a device": Case(["data.source=/dev/zero"], ("/dev/zero",)),
    "a link to itself": Case(_link_loop, ("loop.txt",)),
    "held-out text that is trained on": Case(_trained_on),
}  # fmt: skip


@dataclass(frozen=True)
class HostileFile:
    """A file of rows, and what reading it must give.

    Attributes:
        file: Name of the file.
        content: Its content.
        expected: Number of examples, or a part of the one message.
        texts: Parts of what the examples contain.
        settings: Keys of the group `data`.
    """

    file: str
    content: str | bytes
    expected: int | str
    texts: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def _chat(*contents: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


CHAT = _chat("What is it?", "A test.")
CHATS = _lines(CHAT, CHAT, CHAT)

HOSTILE_FILES = {
    "chat with a BOM": HostileFile("a.jsonl", b"\xef\xbb\xbf" + CHATS.encode(), 3),
    "chat with CRLF": HostileFile("a.jsonl", CHATS.replace("\n", "\r\n"), 3),
    "chat with CR": HostileFile("a.jsonl", CHATS.replace("\n", "\r"), 3),
    "chat in UTF-16": HostileFile("a.jsonl", CHATS.encode("utf-16"), 3),
    "chat in Latin-1": HostileFile(
        "a.jsonl", '{"messages": [{"role": "user", "content": "Grüße"}]}'.encode("latin-1"),
        "line 1: not UTF-8 text, byte 45 is 0xfc",
    ),
    "NUL in a chat": HostileFile("a.jsonl", _lines(_chat("a\0b", "\0")), 1, ("a\\x00b",)),
    "NUL between the lines": HostileFile("a.jsonl", CHATS + "\0\n", "line 4: not valid JSON"),
    "NUL in a table": HostileFile("a.csv", "prompt,completion\na\0b,c\n", 1, ("a\\x00b",)),
    "half a character in a chat": HostileFile(
        "a.jsonl", '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        "line 1: messages[0].content has '\\ud83d'",
    ),
    "half a character in a call": HostileFile(
        "a.jsonl",
        _lines({"messages": [{"role": "assistant", "tool_calls": [
            {"name": "f", "arguments": {"a": "\ud83d"}}]}]}),
        "line 1: messages has '\\ud83d'",
    ),
    "a character beyond 16 bits": HostileFile("a.jsonl", _lines(_chat("\U0001f600", "x")), 1),
    "a very long line": HostileFile("a.jsonl", _lines(_chat("a " * (5 << 20), "b")) + CHATS, 4),
    "a null in place of the messages": HostileFile(
        "a.jsonl", CHATS + '{"messages": null}', "line 4: messages is null, not"
    ),
    "a null content": HostileFile(
        "a.jsonl", _lines(CHAT, _chat("a", None)), "line 2: messages[1] has no content"
    ),
    "a null message": HostileFile("a.jsonl", '{"messages": [null]}', "messages[0] is null"),
    "rows of two formats": HostileFile(
        "a.jsonl", CHATS + '{"prompt": "a", "completion": "b"}', "line 4: messages is null, not"
    ),
    "rows of two formats, of which one is left out": HostileFile(
        "a.jsonl", CHATS + '{"text": "a"}\n', 3, settings={"max_bad_rows": 1}
    ),
    "a content that changes its type": HostileFile(
        "a.jsonl", CHATS + _lines(_chat("a", 5)), "line 4: messages[1].content is a number, not"
    ),
    "an empty file": HostileFile("a.jsonl", "", "no text in it; every file is empty"),
    "an empty table": HostileFile("a.csv", "", "no text in it; every file is empty"),
    "a table without rows": HostileFile("a.csv", "prompt,completion\n", "it has no row"),
    "an array of nothing": HostileFile("a.json", "[]", "it has no row with a field"),
    "a cut row": HostileFile("a.jsonl", CHATS[:-9], "line 3: not valid JSON"),
    "a cut array": HostileFile("a.json", json.dumps([CHAT, CHAT])[:-9], "a.json: not valid JSON"),
    "HTML and markers in the text": HostileFile(
        "a.jsonl", _lines(_chat("<script>alert(1)</script>", "<|im_end|>&amp;</s>")), 1,
        ("<script>alert(1)</script>", "<|im_end|>&amp;</s>"),
    ),
    "escape sequences in a bad row": HostileFile(
        "a.jsonl", _lines({"messages": [{"role": "\x1b[31mred", "content": "a"}]}),
        "messages[0].role is '\\x1b[31mred'",
    ),
    "escape sequences in a column": HostileFile(
        "a.jsonl", _lines({"\x1b[31mred": "a"}), "it has '\\x1b[31mred'"
    ),
    "messages in a list": HostileFile(
        "a.jsonl", _lines({"messages": [CHAT["messages"]]}), "messages[0] is a list"
    ),
    "a chat in a chat": HostileFile("a.jsonl", _lines({"messages": [CHAT]}), "has no role"),
    "a deep content": HostileFile(
        "a.jsonl", '{"messages": ' + nested() + "}\n", "line 1: too deeply nested JSON"
    ),
    "a deep JSON text": HostileFile(
        "a.jsonl", _lines({"messages": nested()}), "line 1: messages is too deeply nested"
    ),
    "a list of lists in place of an object": HostileFile(
        "a.jsonl", '[["role", "user"]]\n', "item 1: an object such as"
    ),
    "keys twice": HostileFile(
        "a.jsonl", '{"messages": 5, "messages": [{"role": "user", "content": "a"}]}', 1
    ),
    "Python in place of JSON": HostileFile(
        "a.csv", "messages\n\"[{'role': 'user', 'content': 'a'}]\"\n", "line 2: messages is text"
    ),
    "a quote that is never closed": HostileFile(
        "a.csv", 'prompt,completion\na,b\n"c,d\n' + "e,f\n" * 9, "line 3: no sound CSV"
    ),
    "a separator without quotes": HostileFile(
        "a.csv", "prompt,completion\na, b,c\n", "line 2: has 3 fields, but the first row names 2"
    ),
    "a table from Windows": HostileFile(
        "a.csv", b"\xef\xbb\xbfprompt;completion\r\n\"a\r\nb\";c\r\n", 1, ("'a\\nb'",)
    ),
    "a table in Latin-1": HostileFile(
        "a.csv", "prompt,completion\na,Grüße\n".encode("latin-1"), "line 2: not UTF-8 text"
    ),
    "numbers that are no tokens": HostileFile(
        "a.jsonl", _lines({"input_ids": [1, -5]}), "line 1: input_ids[1] is -5"
    ),
    "a number that no tokenizer has": HostileFile(
        "a.jsonl", _lines({"input_ids": [1, 10**30]}), "line 1: input_ids[1] is 1000"
    ),
    "tokens that are not a number": HostileFile(
        "a.jsonl", '{"input_ids": [1, NaN]}', "line 1: input_ids[1] is a number, not an integer"
    ),
    "a parquet file that is a table": HostileFile("a.parquet", "a,b\n", "not a sound parquet"),
    "an Arrow file that is a table": HostileFile("a.arrow", "a,b\n", "not a sound Arrow file"),
}  # fmt: skip
"""Name -> a file of rows that is hostile or broken, or only looks so."""
