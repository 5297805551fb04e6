"""Hostile and broken texts to train and evaluate on."""

import json
import os
from collections.abc import Callable
from pathlib import Path

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
