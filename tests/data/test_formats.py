"""Every format in every type of file, from the hub and from a saved data set: the same examples."""

import bz2
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_data import HOSTILE_FILES

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data import hub
from hqqtrain.data.examples import Completion, Conversation, Tokens
from hqqtrain.data.formats.alpaca import PROMPT
from hqqtrain.data.sources import load_training_texts

USER, ANSWER = {"role": "user", "content": 'Grüße,\n"you"'}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
OTHER = {"type": "function", "function": {"name": "g", "arguments": {"y": "z"}}}

FORMATS: dict[str, tuple[list[dict], list]] = {
    "text": ([{"n": 1, "text": "a,\nb"}, {"n": 2, "text": "c"}], ["a,\nb", "c"]),
    "chat": (
        [
            {"messages": [USER, ANSWER]},
            {"messages": [USER, {**ANSWER, "content": None, "tool_calls": [CALL, OTHER]}]},
        ],
        [
            Conversation((USER, ANSWER)),
            Conversation((USER, {"role": "assistant", "content": "", "tool_calls": [CALL, OTHER]})),
        ],
    ),
    "alpaca": (
        [{"instruction": "i", "input": "", "output": "o"}],
        [Completion(PROMPT.replace("{instruction}", "i"), "o")],
    ),
    "completion": ([{"prompt": "p ", "completion": "c"}], [Completion("p ", "c")]),
    "tokens": (
        [{"input_ids": [3, 4], "labels": [-100, 4]}, {"input_ids": [5], "labels": [5]}],
        [Tokens((3, 4), (-100, 4)), Tokens((5,), (5,))],
    ),
}  # fmt: skip


def _json_lines(path: Path, rows: list[dict]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    compress: Callable = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(lines))


def _zstd(path: Path, rows: list[dict]) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def _csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        for row in rows:
            writer.writerow({
                k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()
            })  # fmt: skip


def _feather(path: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path, list[dict]], object]] = {
    "a.jsonl": _json_lines, "a.jsonl.gz": _json_lines, "a.jsonl.bz2": _json_lines,
    "a.jsonl.zst": _zstd, "a.csv": _csv, "a.tsv": _csv, "a.arrow": _feather,
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
}  # fmt: skip


def load(source: Path | str, **settings: object) -> list:
    data = DataConfig(source=str(source), **settings)
    return list(load_training_texts(data, EvalConfig(source=None)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", WRITERS)
def test_a_file(tmp_path, name, format):
    rows, examples = FORMATS[format]
    WRITERS[name](tmp_path / name, rows)
    assert load(tmp_path / name) == examples
    assert load(tmp_path / name, format=format) == examples


@pytest.mark.parametrize("format", FORMATS)
def test_a_data_set_of_the_hub(monkeypatch, format):
    rows, examples = FORMATS[format]
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    monkeypatch.setattr(hub, "_is_hub_reachable", lambda *_: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    assert load("org/name") == examples
    bad = datasets.Dataset.from_list([*rows, dict.fromkeys(rows[0])])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=bad))
    if format != "text":
        with pytest.raises(UserError, match=rf"org/name: cannot read row {len(rows) + 1}.*: "):
            load("org/name")
        assert load("org/name", max_bad_rows=1) == examples


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_files_are_read_or_refused_with_one_message(tmp_path, name):
    case = HOSTILE_FILES[name]
    file = tmp_path / case.file
    file.write_bytes(case.content if isinstance(case.content, bytes) else case.content.encode())
    if isinstance(case.expected, int):
        examples = load(file, **case.settings)
        assert len(examples) == case.expected
        assert all(text in repr(examples) for text in case.texts)
        return
    with pytest.raises(UserError) as caught:
        load(file, **case.settings)
    message = str(caught.value)
    assert message.startswith("data.")
    assert case.expected in message
    assert len(message) < 1000
    assert message.isprintable()
